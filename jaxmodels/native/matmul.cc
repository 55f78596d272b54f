// Products of matrices in float32, of which either may be transposed in memory: y [M, N] = a [M, K] times b [K, N].

#include "panels.h"

namespace {

constexpr int64_t kFetched = 12;  // features of b that are fetched before they are used

// Features k … k + depth - 1 of columns n … n + count - 1: strip after strip, each [depth, kStrip], zeros for the rest.
void CopyStrips(const Matrix& b, int64_t k, int64_t depth, int64_t n, int64_t count, float* to) {
  if (b.column != 1) {
    CopyColumns(depth, count, to, [&](int64_t c, int64_t i, int64_t left) {
      const float* from = b.At(k + i, n + c);
      if (left == kLanes) return Load(from);
      Floats tail = {};
      std::memcpy(&tail, from, left * sizeof *from);
      return tail;
    });
    return;
  }
  for (int64_t i = 0; i < depth; ++i)  // whole rows: few streams of memory
    for (int64_t j = 0; j < count; j += kStrip) {
      const float* from = b.At(k + i, n + j);
      float* into = to + j * depth + i * kStrip;
      if (i + kFetched < depth)
        for (int64_t c = 0; c < kStrip; c += 16) __builtin_prefetch(from + kFetched * b.row + c);
      if (j + kStrip <= count) {
        for (int64_t c = 0; c < kStrip; c += kLanes) Store(into + c, Load(from + c));
      } else {
        for (int64_t c = 0; c < kStrip; ++c) into[c] = j + c < count ? from[c] : 0.0f;
      }
    }
}

// transposed: of a and b, [K, M] and [N, K].
ffi::Error Matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> a, ffi::Buffer<ffi::F32> b,
                  ffi::ResultBuffer<ffi::F32> y, bool a_transposed, bool b_transposed) {
  auto left = a.dimensions(), right = b.dimensions(), out = y->dimensions();
  if (left.size() != 2 || right.size() != 2 || out.size() != 2)
    return ffi::Error::InvalidArgument("a, b and y must be matrices");
  int64_t m = left[a_transposed], k = left[!a_transposed], n = right[!b_transposed];
  if (right[b_transposed] != k || out[0] != m || out[1] != n)
    return ffi::Error::InvalidArgument("a [M, K], b [K, N] and y [M, N] do not fit");
  Matrix first{a.typed_data(), a_transposed ? 1 : k, a_transposed ? m : 1};
  Matrix second{b.typed_data(), b_transposed ? 1 : n, b_transposed ? k : 1};
  Multiply(pool, first, y->typed_data(), m, n, k,
           [&](auto... block) { CopyStrips(second, block...); });
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(Matmuls, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("a_transposed")
                                  .Attr<bool>("b_transposed"));
#pragma GCC visibility pop

// Products of float32 rows with weights that are stored in 16, 8 or 4 bits, summed in float32.
//
// Axes: R rows of x, I input features, O outputs. Weights are [O, I]: an output's weights are contiguous. Few rows: a
// stored weight is read once, widened in registers, and used for all rows, so that the time is that of reading the
// weights. More rows: weights are widened into the strips of panels.h. The order of a sum depends on the number of
// rows, but neither on the other rows' values nor on the number of threads.

#include "panels.h"

namespace {

#if defined(__AVX512F__)
constexpr int kSums = 16;  // running sums that fill the registers
#else
constexpr int kSums = 8;
#endif
constexpr int64_t kFew = 8;  // rows that are multiplied without a widened copy of the weights
constexpr int64_t kPartBytes = 1 << 17;
constexpr int64_t kGroup = 128;  // input features with one scale, of 4-bit weights

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UnalignedWords __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

// Sum of the lanes: with 16, of lane i and i + 8, then i + 4, i + 2, i + 1.
inline float Sum(Floats v) {
  float parts[kLanes];
  Store(parts, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

// Sums of the lanes of K vectors, in the same order; K <= kSums.
template <int K>
inline void Sums(const Floats* v, float* sums) {
#if defined(__AVX512F__)
  // Each step adds halves of two vectors, so that 16 vectors take 15 additions: vectors k and k + 8 first.
  __m512 a[kLanes];
#pragma GCC unroll 16
  for (int k = 0; k < kLanes; ++k) a[k] = k < K ? (__m512)v[k] : _mm512_setzero_ps();
#pragma GCC unroll 16
  for (int k = 0; k < 8; ++k)
    a[k] = _mm512_add_ps(_mm512_shuffle_f32x4(a[k], a[k + 8], 0x44), _mm512_shuffle_f32x4(a[k], a[k + 8], 0xee));
#pragma GCC unroll 16
  for (int k = 0; k < 4; ++k)
    a[k] = _mm512_add_ps(_mm512_shuffle_f32x4(a[k], a[k + 4], 0x88), _mm512_shuffle_f32x4(a[k], a[k + 4], 0xdd));
#pragma GCC unroll 16
  for (int k = 0; k < 2; ++k)
    a[k] = _mm512_add_ps(_mm512_shuffle_ps(a[k], a[k + 2], 0x44), _mm512_shuffle_ps(a[k], a[k + 2], 0xee));
  __m512 all = _mm512_add_ps(_mm512_shuffle_ps(a[0], a[1], 0x88), _mm512_shuffle_ps(a[0], a[1], 0xdd));
  // Lane 4 b + j is the sum of the vector that became part j of block b: see `order`.
  const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  _mm512_mask_storeu_ps(sums, (__mmask16)((1u << K) - 1), _mm512_permutexvar_ps(order, all));
#else
  for (int k = 0; k < K; ++k) sums[k] = Sum(v[k]);
#endif
}

struct Float32 {
  typedef float Stored;
  static Floats Widen(const float* p) { return Load(p); }
};

// Numbers of 16 or 8 bits to 32 bits. GCC divides its own conversion of vectors into small pieces.
inline Words WidenHalves(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words);
#endif
}

inline Floats WidenBytes(const int8_t* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Floats);
#endif
}

struct BFloat16 {
  typedef uint16_t Stored;
  static Floats Widen(const uint16_t* p) { return (Floats)(WidenHalves(p) << 16); }
};

struct Float16 {
  typedef uint16_t Stored;
  static Floats Widen(const uint16_t* p) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    // No subnormal float32 on the way: XLA's threads take them for zeros.
    Words bits = WidenHalves(p), magnitude = bits & 0x7fff;
    Words subnormal = (Words)(magnitude < 0x400), special = (Words)(magnitude >= 0x7c00);  // the second: infinity, NaN
    Words widened = (magnitude << 13) + (112u << 23) + (special & (112u << 23));
    Words small = (Words)(__builtin_convertvector((Ints)magnitude, Floats) * 0x1p-24f);
    return (Floats)((widened & ~subnormal) | (small & subnormal) | ((bits & 0x8000) << 16));
#endif
  }
};

struct Int8 {
  typedef int8_t Stored;
  static Floats Widen(const int8_t* p) { return WidenBytes(p); }
};

// The last weights of a row, fewer than kLanes, with zeros behind them.
template <typename W>
Floats WidenTail(const typename W::Stored* p, int64_t count) {
  typename W::Stored padded[kLanes] = {};
  std::memcpy(padded, p, count * sizeof *p);
  return W::Widen(padded);
}

struct Problem {
  const float* x;      // [R, I]
  const float* scale;  // [O], or null
  float* y;            // [R, O]
  int64_t rows, features, outputs;
};

// Outputs o … o + N - 1 of rows r … r + M - 1.
template <typename W, int M, int N>
inline void Dots(const Problem& p, const typename W::Stored* w, int64_t r, int64_t o) {
  const float* x = p.x + r * p.features;
  Floats sums[M][N] = {};
  int64_t i = 0;
  for (; i + kLanes <= p.features; i += kLanes) {
    Floats weights[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) weights[n] = W::Widen(w + n * p.features + i);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      Floats values = Load(x + m * p.features + i);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sums[m][n] += values * weights[n];
    }
  }
  if (int64_t left = p.features - i; left > 0) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      Floats weights = WidenTail<W>(w + n * p.features + i, left);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sums[m][n] += WidenTail<Float32>(x + m * p.features + i, left) * weights;
    }
  }
  float totals[M][N];
  Sums<M * N>(&sums[0][0], &totals[0][0]);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
      p.y[(r + m) * p.outputs + o + n] = totals[m][n] * (p.scale ? p.scale[o + n] : 1.0f);
}

// The same for output o alone: one stream of memory, which the processor prefetches best, and several running sums.
template <typename W, int M>
inline void LongDots(const Problem& p, const typename W::Stored* w, int64_t r, int64_t o) {
  constexpr int U = 4;
  const float* x = p.x + r * p.features;
  Floats sums[M][U] = {};
  int64_t i = 0;
  for (; i + U * kLanes <= p.features; i += U * kLanes) {
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) {
      Floats weights = W::Widen(w + i + u * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sums[m][u] += Load(x + m * p.features + i + u * kLanes) * weights;
    }
  }
  for (; i < p.features; i += kLanes) {
    int64_t left = std::min(kLanes, p.features - i);
    Floats weights = WidenTail<W>(w + i, left);
    for (int m = 0; m < M; ++m) sums[m][0] += WidenTail<Float32>(x + m * p.features + i, left) * weights;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    float sum = Sum((sums[m][0] + sums[m][1]) + (sums[m][2] + sums[m][3]));
    p.y[(r + m) * p.outputs + o] = sum * (p.scale ? p.scale[o] : 1.0f);
  }
}

// Outputs o … end - 1 of M rows. A weight is widened once.
template <typename W, int M>
void FewDots(const Problem& p, const typename W::Stored* w, int64_t o, int64_t end) {
  constexpr int N = kSums / M;
  for (; o + N <= end; o += N) Dots<W, M, N>(p, w + o * p.features, 0, o);
  for (; o < end; ++o) Dots<W, M, 1>(p, w + o * p.features, 0, o);
}

// Size of each of at least `parts` parts of the outputs, a multiple of `multiple`.
inline int64_t SizeOf(const Problem& p, int64_t parts, int64_t multiple) {
  return ((p.outputs + parts - 1) / parts + multiple - 1) / multiple * multiple;
}

// Calls few(begin, end) for parts of the outputs. With more rows than kFew, it multiplies by vectors of kLanes weights:
// widen(o, i, left) of output o from feature i on, of which `left` exist. bits: of a stored weight.
template <typename Few, typename Widen>
void Multiply(ffi::ThreadPool& pool, const Problem& p, int64_t bits, const Few& few, const Widen& widen) {
  if (p.rows > kFew) {
    Matrix x{p.x, p.features, 1};
    auto copy = [&](int64_t first, int64_t depth, int64_t o, int64_t count, float* strips) {
      CopyColumns(depth, count, strips,
                  [&](int64_t c, int64_t i, int64_t left) { return widen(o + c, first + i, left); });
    };
    return Multiply(pool, x, p.y, p.rows, p.outputs, p.features, copy);
  }
  int64_t bytes = p.features * p.outputs * bits / 8;
  int64_t size = SizeOf(p, std::clamp<int64_t>(bytes * std::max<int64_t>(1, p.rows / 2) / kPartBytes, 1, 16), 8);
  Parallel(pool, (p.outputs + size - 1) / size,
           [&](int64_t part) { few(part * size, std::min(p.outputs, (part + 1) * size)); });
}

template <typename W>
void MultiplyBy(ffi::ThreadPool& pool, const Problem& p, const typename W::Stored* w) {
  auto few = [&](int64_t o, int64_t end) {
    switch (p.rows) {
      case 1:
        for (; o < end; ++o) LongDots<W, 1>(p, w + o * p.features, 0, o);
        return;
      case 2:
        for (; o < end; ++o) LongDots<W, 2>(p, w + o * p.features, 0, o);
        return;
      case 3: return FewDots<W, 3>(p, w, o, end);
      case 4: return FewDots<W, 4>(p, w, o, end);
      case 5: return FewDots<W, 5>(p, w, o, end);
      case 6: return FewDots<W, 6>(p, w, o, end);
      case 7: return FewDots<W, 7>(p, w, o, end);
      default: return FewDots<W, 8>(p, w, o, end);
    }
  };
  auto widen = [&](int64_t o, int64_t i, int64_t left) {
    const typename W::Stored* stored = w + o * p.features + i;
    __builtin_prefetch(stored + kLanes * p.features);  // of the outputs that are widened next
    Floats weights = left == kLanes ? W::Widen(stored) : WidenTail<W>(stored, left);
    return p.scale ? weights * p.scale[o] : weights;
  };
  Multiply(pool, p, 8 * sizeof *w, few, widen);
}

// 128 weights of 4 bits in 16 words: bits 4 k to 4 k + 3 of word l are 8 + the integer of feature 16 k + l.
struct Group {
  static constexpr int kParts = 16 / kLanes, kVectors = kGroup / kLanes;
  Words words[kParts];
  Floats scale;
  Group(const uint32_t* w, float s) : scale(Levels() * s) {
    for (int h = 0; h < kParts; ++h) words[h] = *reinterpret_cast<const UnalignedWords*>(w + h * kLanes);
  }
  // The weights of features kLanes · v … kLanes · (v + 1) - 1.
  Floats At(int v) const {
    Words shifted = words[v % kParts] >> (4 * (v / kParts));
#if defined(__AVX512F__)
    return (Floats)_mm512_permutexvar_ps((__m512i)shifted, (__m512)scale);
#else
    return (__builtin_convertvector((Ints)(shifted & 15), Floats) - 8.0f) * scale;
#endif
  }
  // Factor of the scale in each lane; with AVX-512 a table of the 16 weights.
  static Floats Levels() {
#if defined(__AVX512F__)
    return Floats{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
#else
    return Floats{} + 1.0f;
#endif
  }
};

// Output o of rows r … r + M - 1, with words [O, I / 8] and a scale for each group, [O, I / 128].
template <int M>
inline void GroupDots(const Problem& p, const uint32_t* w, const float* scale, int64_t r, int64_t o) {
  constexpr int U = M > 2 ? 1 : 4;
  int64_t groups = p.features / kGroup;
  const float* x = p.x + r * p.features;
  Floats sums[M][U] = {};
  for (int64_t g = 0; g < groups; ++g) {
    Group group(w + (o * groups + g) * 16, scale[o * groups + g]);
#pragma GCC unroll 32
    for (int k = 0; k < Group::kVectors; ++k) {
      Floats weights = group.At(k);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sums[m][k % U] += Load(x + m * p.features + g * kGroup + k * kLanes) * weights;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    Floats sum = sums[m][0];
#pragma GCC unroll 16
    for (int u = 1; u < U; ++u) sum += sums[m][u];
    p.y[(r + m) * p.outputs + o] = Sum(sum);
  }
}

void MultiplyByGroups(ffi::ThreadPool& pool, const Problem& p, const uint32_t* w, const float* scale) {
  auto few = [&](int64_t o, int64_t end) {
    for (; o < end; ++o) {
      int64_t r = 0;
      for (; r + 4 <= p.rows; r += 4) GroupDots<4>(p, w, scale, r, o);
      for (; r + 2 <= p.rows; r += 2) GroupDots<2>(p, w, scale, r, o);
      if (r < p.rows) GroupDots<1>(p, w, scale, r, o);
    }
  };
  auto widen = [&](int64_t o, int64_t i, int64_t) {
    int64_t g = (o * p.features + i) / kGroup;
    __builtin_prefetch(w + g * 16 + kLanes * p.features / 8);
    return Group(w + g * 16, scale[g]).At(i % kGroup / kLanes);
  };
  Multiply(pool, p, 4, few, widen);
}

ffi::Error Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer weight, ffi::AnyBuffer scale,
                   ffi::ResultBuffer<ffi::F32> y) {
  auto shape = weight.dimensions(), rows = x.dimensions(), out = y->dimensions();
  if (shape.size() != 2 || rows.size() != 2 || out.size() != 2)
    return ffi::Error::InvalidArgument("x, weight and y must be matrices");
  Problem p{x.typed_data(), nullptr, y->typed_data(), rows[0], rows[1], out[1]};
  bool grouped = weight.element_type() == ffi::U32;
  if (shape[0] != p.outputs || shape[1] * (grouped ? 8 : 1) != p.features || out[0] != p.rows)
    return ffi::Error::InvalidArgument("x [R, I], weight [O, I] (4 bits: [O, I / 8]) and y [R, O] do not fit");
  if (grouped && p.features % kGroup != 0)
    return ffi::Error::InvalidArgument("with 4-bit weights I must be a multiple of 128");
  int64_t scales = p.outputs * (grouped ? p.features / kGroup : 1);
  if (grouped || scale.element_count() > 0) {
    if (scale.element_type() != ffi::F32 || (int64_t)scale.element_count() != scales)
      return ffi::Error::InvalidArgument("scale must be float32 [O], with 4-bit weights [O, I / 128]");
    p.scale = static_cast<const float*>(scale.untyped_data());
  }
  const void* data = weight.untyped_data();
  if (grouped) {
    const float* factors = std::exchange(p.scale, nullptr);  // the widened weights contain them
    MultiplyByGroups(pool, p, static_cast<const uint32_t*>(data), factors);
    return ffi::Error::Success();
  }
  const uint16_t* halves = static_cast<const uint16_t*>(data);
  switch (weight.element_type()) {
    case ffi::F16:
      MultiplyBy<Float16>(pool, p, halves);
      return ffi::Error::Success();
    case ffi::BF16:
      MultiplyBy<BFloat16>(pool, p, halves);
      return ffi::Error::Success();
    case ffi::S8:
      MultiplyBy<Int8>(pool, p, static_cast<const int8_t*>(data));
      return ffi::Error::Success();
    default:
      return ffi::Error::InvalidArgument("weight must be float16, bfloat16, int8 or, for 4 bits, uint32");
  }
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(Products, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
#pragma GCC visibility pop

// Product of float32 rows with columns that are copied block by block, for the kernels of this folder: y [M, N] = a [M, K]
// times b [K, N].
//
// A block of b, kDepth features of kColumns columns, is copied into the second cache in strips, each of kVectors vectors
// of columns; the same features of a are copied as panels of kPanel rows, of which one stays in the first cache. A
// panel times a strip is summed in registers. An element of y is the sum over the blocks of features, in order: it
// depends neither on other rows or columns nor on the number of threads.

#ifndef JAXMODELS_NATIVE_PANELS_H_
#define JAXMODELS_NATIVE_PANELS_H_

#include "vectors.h"

namespace {

#if defined(__AVX512F__)
constexpr int kPanel = 12;  // rows; their sums and two vectors of b fill the registers. At most kLanes.
#elif defined(__AVX2__)
constexpr int kPanel = 6;
#else
constexpr int kPanel = 4;
#endif
constexpr int kVectors = 2;
constexpr int64_t kStrip = kVectors * kLanes;
constexpr int64_t kDepth = 512, kColumns = 256;
constexpr int64_t kRows = 10 * kPanel;  // of a part of the work at least
constexpr int64_t kAhead = 8;  // features of a strip that are fetched before they are used

inline int64_t Divided(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t Rounded(int64_t a, int64_t b) { return Divided(a, b) * b; }

// Matrix whose element (i, j) is data[i * row + j * column]; one of the two is 1.
struct Matrix {
  const float* data;
  int64_t row, column;
  const float* At(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

// Writes kLanes numbers of each of `count` rows, `pitch` apart, transposed: number i of row r to to[i * stride + r].
// Rows from `count` on are zeros. Writes kLanes numbers each time, also if the stride is less.
inline void CopyTransposed(const float* from, int64_t pitch, int64_t count, float* to, int64_t stride) {
  Floats v[kLanes];
#pragma GCC unroll 16
  for (int64_t r = 0; r < kLanes; ++r) v[r] = r < count ? Load(from + r * pitch) : Floats{};
  Exchange(v);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) Store(to + i * stride, v[i]);
}

// Features k … k + depth - 1 of rows m … m + count - 1, count <= kPanel: [depth, kPanel], with zeros for other rows.
void CopyPanel(const Matrix& a, int64_t m, int64_t count, int64_t k, int64_t depth, float* to) {
  int64_t i = 0;
  if (a.column == 1) {
    // The last vector written reaches into the next features, which are written later.
    for (; i + 2 * kLanes <= depth; i += kLanes)
      CopyTransposed(a.At(m, k + i), a.row, count, to + i * kPanel, kPanel);
  } else if (count == kPanel) {
    for (; i < depth; ++i) std::memcpy(to + i * kPanel, a.At(m, k + i), kPanel * sizeof(float));
  }
  for (; i < depth; ++i)
    for (int64_t r = 0; r < kPanel; ++r) to[i * kPanel + r] = r < count ? *a.At(m + r, k + i) : 0.0f;
}

// Features of `count` rows of memory as columns of strips, each [depth, kStrip]. vector(c, i, left): kLanes numbers of
// column c from feature i on, with anything behind the first `left`. Columns from `count` on are zeros.
template <typename Vector>
inline void CopyColumns(int64_t depth, int64_t count, float* to, const Vector& vector) {
  for (int64_t j = 0; j < Rounded(count, kStrip); j += kLanes) {
    float* into = to + j / kStrip * kStrip * depth + j % kStrip;
    for (int64_t i = 0; i < depth; i += kLanes) {
      int64_t left = std::min(kLanes, depth - i);
      Floats v[kLanes];
      if (left == kLanes && j + kLanes <= count) {
#pragma GCC unroll 16
        for (int64_t c = 0; c < kLanes; ++c) v[c] = vector(j + c, i, kLanes);
      } else {
        for (int64_t c = 0; c < kLanes; ++c) v[c] = j + c < count ? vector(j + c, i, left) : Floats{};
      }
      Exchange(v);
#pragma GCC unroll 16
      for (int64_t l = 0; l < kLanes; ++l)
        if (l < left) Store(into + (i + l) * kStrip, v[l]);
    }
  }
}

// R rows of a panel times a strip: the first `rows` of them into `columns` columns of y, or added to them.
template <int R>
void Multiply(const float* panel, const float* strip, int64_t depth, float* y, int64_t pitch, int64_t rows,
              int64_t columns, bool add) {
  Floats sums[R][kVectors] = {};
#pragma GCC unroll 2
  for (int64_t i = 0; i < depth; ++i) {
    Floats values[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      values[v] = Load(strip + i * kStrip + v * kLanes);
      __builtin_prefetch(strip + (i + kAhead) * kStrip + v * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] += values[v] * panel[i * kPanel + r];
  }
  bool whole = columns >= kStrip;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (r >= rows) return;
    float* into = y + r * pitch;
    if (whole) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        Store(into + v * kLanes, add ? Load(into + v * kLanes) + sums[r][v] : sums[r][v]);
    } else {
      float values[kStrip];
      std::memcpy(values, sums[r], sizeof values);
      for (int64_t c = 0; c < columns; ++c) into[c] = add ? into[c] + values[c] : values[c];
    }
  }
}

// Memory of this thread for a block of b, kept for the next one: a new one costs as many page faults as it has pages.
inline float* Strips() {
  thread_local Memory strips = Allocate(kDepth * Rounded(kColumns, kStrip));
  return strips.get();
}

// copy(first, depth, left, count, strips) copies features first … first + depth - 1 of columns left … left + count - 1;
// `first` is a multiple of kLanes.
template <typename Copy>
void Multiply(ffi::ThreadPool& pool, const Matrix& a, float* y, int64_t m, int64_t n, int64_t k, const Copy& copy) {
  if (m == 0 || n == 0) return;
  // Parts of at least kRows rows, and of kColumns columns, or of fewer if there would be less than two for each thread.
  int64_t wanted = 2 * std::max<int64_t>(1, pool.num_threads());
  int64_t columns = std::min(kColumns, Rounded(n, kStrip));
  int64_t down = std::clamp<int64_t>(Divided(wanted, Divided(n, columns)), 1, Divided(m, kRows));
  columns = std::clamp(Rounded(Divided(n, Divided(wanted, down)), kStrip), kStrip, columns);
  int64_t rows = Rounded(Divided(m, down), kPanel), across = Divided(n, columns);
  down = Divided(m, rows);
  int64_t steps = std::max<int64_t>(1, Divided(k, kDepth)), most = Rounded(Divided(k, steps), kLanes);
  int64_t panels = Divided(m, kPanel), pack = panels * kPanel * most;
  // Blocks of features for which a is copied at once: of few rows all, as threads wait for each other after each copy.
  int64_t together = m <= kRows ? steps : 1;
  Memory packed = Allocate(together * pack);
  for (int64_t begun = 0; begun < steps; begun += together) {
    auto first = [&](int64_t step) { return std::min(k, (begun + step) * most); };
    auto depth = [&](int64_t step) { return std::min(most, k - first(step)); };
    Parallel(pool, Divided(panels, 8) * together, [&](int64_t part) {
      int64_t step = part % together, begin = part / together * 8;
      for (int64_t panel = begin; panel < std::min(panels, begin + 8); ++panel) {
        int64_t row = panel * kPanel, count = std::min<int64_t>(kPanel, m - row);
        CopyPanel(a, row, count, first(step), depth(step), packed.get() + step * pack + row * depth(step));
      }
    });
    Parallel(pool, down * across, [&](int64_t part) {
      int64_t begin = part % down * rows, end = std::min(m, begin + rows);
      int64_t left = part / down * columns, count = std::min(columns, n - left);
      float* strips = Strips();
      for (int64_t step = 0; step < together; ++step) {
        int64_t features = depth(step);
        copy(first(step), features, left, count, strips);
        for (int64_t row = begin; row < end; row += kPanel) {
          auto multiply = end - row > kPanel * 2 / 3 ? Multiply<kPanel>
                          : end - row > kPanel / 3   ? Multiply<kPanel * 2 / 3>
                                                     : Multiply<kPanel / 3>;
          const float* panel = packed.get() + step * pack + row * features;
          for (int64_t j = 0; j < count; j += kStrip)
            multiply(panel, strips + j * features, features, y + row * n + left + j, n, end - row, count - j,
                     begun + step > 0);
        }
      }
    });
  }
}

}  // namespace

#endif  // JAXMODELS_NATIVE_PANELS_H_

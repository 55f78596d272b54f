// Vectors of floats, aligned memory, and work in parts on XLA's threads, for the kernels of this folder.

#ifndef JAXMODELS_NATIVE_VECTORS_H_
#define JAXMODELS_NATIVE_VECTORS_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Numbers of a vector: as many as a register holds, as GCC divides larger ones at a high cost.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedFloats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Floats Load(const float* p) { return *reinterpret_cast<const UnalignedFloats*>(p); }
inline void Store(float* p, Floats v) { *reinterpret_cast<UnalignedFloats*>(p) = v; }

// Transposes kLanes vectors: lane j of vector k becomes lane k of vector j.
inline void Exchange(Floats* v) {
#if defined(__AVX512F__)
  __m512 a[kLanes], b[kLanes];
#pragma GCC unroll 16
  for (int k = 0; k < kLanes; k += 2) {
    a[k] = _mm512_unpacklo_ps((__m512)v[k], (__m512)v[k + 1]);
    a[k + 1] = _mm512_unpackhi_ps((__m512)v[k], (__m512)v[k + 1]);
  }
#pragma GCC unroll 16
  for (int k = 0; k < kLanes; k += 4)
#pragma GCC unroll 16
    for (int j = 0; j < 2; ++j) {
      b[k + 2 * j] = _mm512_shuffle_ps(a[k + j], a[k + 2 + j], 0x44);
      b[k + 2 * j + 1] = _mm512_shuffle_ps(a[k + j], a[k + 2 + j], 0xee);
    }
  // b[4 q + j] has lanes j, j + 4, j + 8, j + 12 of vectors 4 q … 4 q + 3.
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {
    __m512 low[2], high[2];
#pragma GCC unroll 16
    for (int h = 0; h < 2; ++h) {
      low[h] = _mm512_shuffle_f32x4(b[8 * h + j], b[8 * h + 4 + j], 0x88);
      high[h] = _mm512_shuffle_f32x4(b[8 * h + j], b[8 * h + 4 + j], 0xdd);
    }
    v[j] = (Floats)_mm512_shuffle_f32x4(low[0], low[1], 0x88);
    v[j + 8] = (Floats)_mm512_shuffle_f32x4(low[0], low[1], 0xdd);
    v[j + 4] = (Floats)_mm512_shuffle_f32x4(high[0], high[1], 0x88);
    v[j + 12] = (Floats)_mm512_shuffle_f32x4(high[0], high[1], 0xdd);
  }
#else
  float a[kLanes][kLanes];
  std::memcpy(a, v, sizeof a);
  for (int k = 0; k < kLanes; ++k)
    for (int j = 0; j < k; ++j) std::swap(a[k][j], a[j][k]);
  std::memcpy(v, a, sizeof a);
#endif
}

// Memory for floats, aligned for whole vectors.
struct Free {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
};
typedef std::unique_ptr<float[], Free> Memory;
inline Memory Allocate(int64_t count) {
  return Memory(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t(64))));
}

// Calls f(0), …, f(parts - 1) on this thread and those of XLA's pool. It waits only for parts that were begun: a task
// that the pool starts late finds none left, so that a busy pool cannot block it.
template <typename F>
void Parallel(ffi::ThreadPool& pool, int64_t parts, const F& f) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  int64_t threads = std::min(parts, std::max<int64_t>(1, pool.num_threads()));
  if (threads <= 1) {
    for (int64_t i = 0; i < parts; ++i) f(i);
    return;
  }
  auto state = std::make_shared<State>();
  const F* function = &f;  // used only while parts are left, hence while this call waits
  auto work = [state, function, parts] {
    for (int64_t i; (i = state->next.fetch_add(1)) < parts;) {
      (*function)(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 1; i < threads; ++i) pool.Schedule(std::function<void()>(work));
  work();
  for (int64_t spins = 0; state->done.load(std::memory_order_acquire) < parts; ++spins)
    if (spins > 4096) std::this_thread::yield();
}

}  // namespace

#endif  // JAXMODELS_NATIVE_VECTORS_H_

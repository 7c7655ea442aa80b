#pragma once

// One row of a vocabulary shard: its statistics, its gradient. Included by cross_entropy_cpu.cpp alone.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu_math.h"
#include "cpu_numbers.h"
#include "multiversion.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Columns worked on at a time: a block that has to be read again is still in the first-level cache.
constexpr int64_t kBlock = 1024;
// A sum of exponentials beyond this is taken again with a larger shift, well before exp_of_normal leaves its range.
constexpr float kRescaleAbove = 1e30f;
// How far ahead rows are fetched: the long chains of exp keep the processor from running ahead by itself.
constexpr int64_t kPrefetchBytes = 8192;
struct Statistics {
  float lse;
  float sum;
};

struct GradientRow {
  float scale_p;  // the gradient is scale_p * exp(x - lse) + offset, and at the target + target_term
  float offset;
  float target_term;
  float lse;
  int64_t target;  // column in this shard, or -1
  bool stream;     // write past the caches
};

template <class T>
FM_INLINE float block_maximum(const T* x, int64_t n) {
  float maximum = -kInfinity;
  for (int64_t j = 0; j < n; ++j) maximum = std::max(maximum, to_float(x[j]));
  return maximum;
}

FM_INLINE void prefetch(const void* from, int64_t num_bytes) {
#if defined(__GNUC__)
  const char* lines = static_cast<const char*>(from) + kPrefetchBytes;
  for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(lines + i, 0, 2);
#endif
}

// sum_j exp(x_j - shift); adds sum_j x_j to `sum` if asked for.
template <bool kWithSum, class T>
FM_INLINE float block_exp_sum(const T* x, int64_t n, float shift, double& sum) {
  float exp_sum = 0.0f, plain_sum = 0.0f;
#pragma omp simd reduction(+ : exp_sum, plain_sum)
  for (int64_t j = 0; j < n; ++j) {
    const float value = to_float(x[j]);
    exp_sum += exp_of_normal(value - shift);
    if (kWithSum) plain_sum += value;
  }
  sum += plain_sum;
  return exp_sum;
}

// One pass: a block is summed with the shift found so far. Only the first block, and one whose values lie so far above
// the shift that the sum might overflow, is read again for its maximum.
template <bool kWithSum, class T>
FM_INLINE Statistics row_statistics(const T* x, int64_t n) {
  float shift = -kInfinity;
  double exp_sum = 0.0, sum = 0.0, unused = 0.0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t length = std::min(kBlock, n - start);
    prefetch(x + start, length * sizeof(T));
    // -inf minus -inf would be NaN; shifted by 0, -inf gives 0, and NaN, which is no maximum, still gives NaN.
    float block = block_exp_sum<kWithSum>(x + start, length, shift == -kInfinity ? 0.0f : shift, sum);
    if (shift == -kInfinity || !(std::abs(block) < kRescaleAbove)) {
      const float wanted = block_maximum(x + start, length);
      if (wanted > shift) {
        exp_sum *= std::exp(static_cast<double>(shift) - wanted);
        shift = wanted;
        block = block_exp_sum<false>(x + start, length, shift, unused);
      }
    }
    exp_sum += block;
  }
  const double lse = (shift == -kInfinity ? 0.0 : shift) + std::log(exp_sum);
  return {static_cast<float>(lse), static_cast<float>(sum)};
}

// Copy whole 16-byte pieces past the caches; both ends aligned to 16 bytes.
FM_INLINE void stream_copy(void* destination, const void* source, int64_t num_bytes) {
#if defined(__SSE2__)
  auto* to = static_cast<__m128i*>(destination);
  const auto* from = static_cast<const __m128i*>(source);
  for (int64_t i = 0; i < num_bytes / 16; ++i) _mm_stream_si128(to + i, _mm_load_si128(from + i));
#else
  std::memcpy(destination, source, num_bytes);
#endif
}

template <class T>
FM_INLINE void gradient_block(const T* x, int64_t n, const GradientRow& row, int64_t target, T* result) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    result[j] = from_float<T>(row.scale_p * exp_of_normal(to_float(x[j]) - row.lse) + row.offset);
  }
  if (target >= 0 && target < n) {
    const float p = exp_of_normal(to_float(x[target]) - row.lse);
    result[target] = from_float<T>(row.scale_p * p + (row.offset + row.target_term));
  }
}

template <class T>
FM_INLINE void row_gradient(const T* x, int64_t n, const GradientRow& row, T* dx) {
  if (!row.stream) return gradient_block(x, n, row, row.target, dx);
  alignas(64) T buffer[kBlock];
  constexpr int64_t kPerLine = 64 / sizeof(T);
  const int64_t misaligned = (reinterpret_cast<uintptr_t>(dx) % 64) / sizeof(T);
  const int64_t head = std::min(n, (kPerLine - misaligned) % kPerLine);
  gradient_block(x, head, row, row.target, dx);
  int64_t start = head;
  while (start + kPerLine <= n) {
    const int64_t length = std::min(kBlock, (n - start) / kPerLine * kPerLine);
    prefetch(x + start, length * sizeof(T));
    gradient_block(x + start, length, row, row.target - start, buffer);
    stream_copy(dx + start, buffer, length * sizeof(T));
    start += length;
  }
  gradient_block(x + start, n - start, row, row.target - start, dx + start);
}

#define FM_ROWS(T)                                                                              \
  FM_MULTIVERSION Statistics statistics_of_row(const T* x, int64_t n) {                         \
    return row_statistics<false>(x, n);                                                         \
  }                                                                                             \
  FM_MULTIVERSION Statistics statistics_with_sum_of_row(const T* x, int64_t n) {                \
    return row_statistics<true>(x, n);                                                          \
  }                                                                                             \
  FM_MULTIVERSION void gradient_of_row(const T* x, int64_t n, const GradientRow* row, T* dx) {  \
    row_gradient(x, n, *row, dx);                                                               \
  }
FM_ROWS(float)
FM_ROWS(BFloat16)
FM_ROWS(Float16)
#undef FM_ROWS

}  // namespace
}  // namespace fm

// One row of a vocabulary shard: its statistics and its gradient. Only cross_entropy_cpu.cpp includes this file.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/math.h"
#include "cpu/multiversion.h"
#include "cpu/numbers.h"
#include "cpu/sum.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Columns of a block: if it must be read again, it is still in the first-level cache.
constexpr int64_t kBlock = 1024;
// A larger sum of exponentials is computed again with a larger shift, well before exp_of_normal leaves its range.
constexpr float kRescaleAbove = 1e30f;
// Prefetch distance: the long dependency chains of exp keep the processor from running ahead by itself.
constexpr int64_t kPrefetchBytes = 8192;

// x becomes cap * tanh(x / cap).
struct Softcap {
  float cap, minus_two_over_cap;
};

// In double: a large part that all logits have in common must not cost the precision of the rest.
struct Statistics {
  double lse;
  double sum;
};

struct GradientRow {
  float scale_p;  // the gradient is scale_p * exp(x - shift) + offset; at the target, plus target_term
  float offset;
  float target_term;
  float shift;
  int64_t target;  // column in this shard, or -1
  bool stream;     // write past the caches
};

FM_INLINE void prefetch(const void* from, int64_t num_bytes) {
#if defined(__GNUC__)
  const char* lines = static_cast<const char*>(from) + kPrefetchBytes;
  for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(lines + i, 0, 2);
#endif
}

// With e = exp(-2 |x| / cap), tanh(|x| / cap) = (1 - e) / (1 + e), and its slope is 4 e / (1 + e)^2. Neither overflows,
// and the slope has no cancellation, unlike 1 - tanh^2.
FM_INLINE float capped(float x, const Softcap& softcap, float& slope) {
  const float magnitude = std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0x7FFFFFFFu);
  const float e = exp_of_normal(magnitude * softcap.minus_two_over_cap);
  const float reciprocal = 1.0f / (1.0f + e);
  const float size = softcap.cap * ((1.0f - e) * reciprocal);
  slope = 4.0f * e * (reciprocal * reciprocal);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(size) | (std::bit_cast<uint32_t>(x) & 0x80000000u));
}

template <bool kSoftcap>
FM_INLINE float logit(float x, const Softcap& softcap) {
  float slope;
  if constexpr (kSoftcap) return capped(x, softcap, slope);
  return x;
}

template <class T>
FM_INLINE float block_maximum(const T* x, int64_t n) {
  constexpr int kLanes = 16;
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -kInfinity);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const float value = to_float(x[j + lane]);
      lanes[lane] = value > lanes[lane] ? value : lanes[lane];  // NaN is never the maximum
    }
  }
  for (; j < n; ++j) lanes[0] = std::max(lanes[0], to_float(x[j]));
  return *std::max_element(lanes, lanes + kLanes);
}

// Returns sum_j exp(x_j - shift). kWithSum: also adds sum_j x_j to `sum`; its float32 part sums x_j - shift.
template <bool kWithSum, bool kSoftcap, class T>
FM_INLINE float block_exp_sum(const T* x, int64_t n, const Softcap& softcap, float shift, double& sum) {
  float sums[1 + kWithSum];
  lane_sums(n, sums, [&](int64_t j, float* lane) __attribute__((always_inline)) {
    const float value = logit<kSoftcap>(to_float(x[j]), softcap) - shift;
    lane[0] += exp_of_normal(value);
    if constexpr (kWithSum) lane[kSumLanes] += value;
  });
  if constexpr (kWithSum) sum = sums[1] + static_cast<double>(n) * shift;
  return sums[0];
}

// One pass: a block is summed with the current shift. Only two kinds of blocks are read again for their maximum: the
// first, and a block whose values lie so far above the shift that the sum might overflow.
template <bool kWithSum, bool kSoftcap, class T>
FM_INLINE Statistics row_statistics(const T* x, int64_t n, const Softcap& softcap) {
  float shift = -kInfinity;
  double exp_sum = 0.0, sum = 0.0, block_sum = 0.0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t length = std::min(kBlock, n - start);
    prefetch(x + start, length * sizeof(T));
    // -inf minus -inf would be NaN. With shift 0, -inf gives 0, and NaN, which is never the maximum, still gives NaN.
    const float known = shift == -kInfinity ? 0.0f : shift;
    float block = block_exp_sum<kWithSum, kSoftcap>(x + start, length, softcap, known, block_sum);
    if (shift == -kInfinity || !(std::abs(block) < kRescaleAbove)) {
      const float wanted = logit<kSoftcap>(block_maximum(x + start, length), softcap);
      if (wanted > shift) {
        exp_sum *= std::exp(static_cast<double>(shift) - wanted);
        shift = wanted;
        block = block_exp_sum<kWithSum, kSoftcap>(x + start, length, softcap, shift, block_sum);
      }
    }
    exp_sum += block;
    sum += block_sum;
  }
  return {(shift == -kInfinity ? 0.0 : shift) + std::log(exp_sum), sum};
}

// Copies 16-byte pieces past the caches; both addresses are aligned to 16 bytes.
FM_INLINE void stream_copy(void* destination, const void* source, int64_t num_bytes) {
#if defined(__SSE2__)
  auto* to = static_cast<__m128i*>(destination);
  const auto* from = static_cast<const __m128i*>(source);
  for (int64_t i = 0; i < num_bytes / 16; ++i) _mm_stream_si128(to + i, _mm_load_si128(from + i));
#else
  std::memcpy(destination, source, num_bytes);
#endif
}

template <bool kSoftcap>
FM_INLINE float gradient_of(float x, const Softcap& softcap, const GradientRow& row, float offset) {
  float slope = 1.0f;
  if constexpr (kSoftcap) x = capped(x, softcap, slope);
  const float gradient = row.scale_p * exp_of_normal(x - row.shift) + offset;
  return kSoftcap ? gradient * slope : gradient;
}

// `result` may be x itself.
template <bool kSoftcap, class T>
FM_INLINE void gradient_block(
    const T* x, int64_t n, const Softcap& softcap, const GradientRow& row, int64_t target, T* result) {
  const bool here = target >= 0 && target < n;
  const float at_target =
      here ? gradient_of<kSoftcap>(to_float(x[target]), softcap, row, row.offset + row.target_term) : 0.0f;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    result[j] = from_float<T>(gradient_of<kSoftcap>(to_float(x[j]), softcap, row, row.offset));
  }
  if (here) result[target] = from_float<T>(at_target);
}

// The row's numbers are taken by value: the compiler would assume that references may be overwritten.
template <bool kSoftcap, class T>
FM_INLINE void row_gradient(const T* x, int64_t n, const Softcap softcap, const GradientRow row, T* dx) {
  if (!row.stream) return gradient_block<kSoftcap>(x, n, softcap, row, row.target, dx);
  alignas(64) T buffer[kBlock];
  constexpr int64_t kPerLine = 64 / sizeof(T);
  const int64_t misaligned = (reinterpret_cast<uintptr_t>(dx) % 64) / sizeof(T);
  const int64_t head = std::min(n, (kPerLine - misaligned) % kPerLine);
  gradient_block<kSoftcap>(x, head, softcap, row, row.target, dx);
  int64_t start = head;
  while (start + kPerLine <= n) {
    const int64_t length = std::min(kBlock, (n - start) / kPerLine * kPerLine);
    prefetch(x + start, length * sizeof(T));
    gradient_block<kSoftcap>(x + start, length, softcap, row, row.target - start, buffer);
    stream_copy(dx + start, buffer, length * sizeof(T));
    start += length;
  }
  gradient_block<kSoftcap>(x + start, n - start, softcap, row, row.target - start, dx + start);
}

// target_clones takes no templates, so every combination is a plain function.
#define FM_ROWS(T)                                                                                                 \
  FM_MULTIVERSION Statistics statistics_of_row(const T* x, int64_t n) {                                            \
    return row_statistics<false, false>(x, n, Softcap{});                                                          \
  }                                                                                                                \
  FM_MULTIVERSION Statistics statistics_with_sum_of_row(const T* x, int64_t n) {                                   \
    return row_statistics<true, false>(x, n, Softcap{});                                                           \
  }                                                                                                                \
  FM_MULTIVERSION Statistics capped_statistics_of_row(const T* x, int64_t n, const Softcap* softcap) {             \
    return row_statistics<true, true>(x, n, *softcap);                                                             \
  }                                                                                                                \
  FM_MULTIVERSION void gradient_of_row(const T* x, int64_t n, const GradientRow* row, T* dx) {                     \
    row_gradient<false>(x, n, Softcap{}, *row, dx);                                                                \
  }                                                                                                                \
  FM_MULTIVERSION void capped_gradient_of_row(const T* x, int64_t n, const Softcap* softcap, const GradientRow* row, \
                                              T* dx) {                                                             \
    row_gradient<true>(x, n, *softcap, *row, dx);                                                                  \
  }
FM_ROWS(float)
FM_ROWS(BFloat16)
FM_ROWS(Float16)
#undef FM_ROWS

}  // namespace
}  // namespace fm

// Rows of one token on the CPU: copies, the weighted sum of the rows of its experts, and the gradients of both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/multiversion.h"
#include "cpu/numbers.h"
#include "cpu/streaming.h"
#include "cpu/sum.h"

namespace fm {
namespace {

constexpr int64_t kRowBlock = 256;  // columns that are worked on together; they stay in the first-level cache

// out = the sum over k of weights[k] * rows[k], in this order.
template <typename T>
FM_INLINE void sum_of_rows(const T* const* rows, const float* weights, int64_t count, int64_t n, T* out) {
  constexpr int64_t kLanes = 64;  // four vectors of the largest width, which the compiler keeps in registers
  for (int64_t begin = 0; begin < n; begin += kLanes) {
    const int64_t width = std::min(kLanes, n - begin);
    float sums[kLanes] = {};
    if (width == kLanes) {
      for (int64_t k = 0; k < count; ++k) {
        const T* row = rows[k] + begin;
        const float weight = weights[k];
#pragma omp simd
        for (int64_t j = 0; j < kLanes; ++j) sums[j] += weight * to_float(row[j]);
      }
#pragma omp simd
      for (int64_t j = 0; j < kLanes; ++j) out[begin + j] = from_float<T>(sums[j]);
    } else {
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t j = 0; j < width; ++j) sums[j] += weights[k] * to_float(rows[k][begin + j]);
      }
      for (int64_t j = 0; j < width; ++j) out[begin + j] = from_float<T>(sums[j]);
    }
  }
}

// Writes out = weight * grad (past the caches if `stream`) unless out is null, and returns the dot product of grad and
// row (0 if row is null).
template <typename T>
FM_INLINE float scaled_row_and_dot(const T* grad, const T* row, float weight, int64_t n, T* out, bool stream) {
  alignas(kLineBytes) T buffer[kRowBlock];
  float dot = 0.0f;
  for (int64_t begin = 0; begin < n; begin += kRowBlock) {
    const int64_t width = std::min(kRowBlock, n - begin);
    const T* g = grad + begin;
    if (row != nullptr) {
      const T* y = row + begin;
      float sum[1];
      lane_sums<1>(width, sum, [&](int64_t j, float* lane) __attribute__((always_inline)) { lane[0] += to_float(g[j]) * to_float(y[j]); });
      dot += sum[0];
    }
    if (out == nullptr) continue;
    T* to = stream ? buffer : out + begin;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) to[j] = from_float<T>(weight * to_float(g[j]));
    if (stream) stream_copy(out + begin, buffer, width * sizeof(T));
  }
  return dot;
}

// target_clones takes no templates, so every combination is a plain function.
#define FM_EXPERT_ROWS(T)                                                                                     \
  FM_MULTIVERSION void combine_row(const T* const* rows, const float* weights, int64_t count, int64_t n, T* out) { \
    sum_of_rows(rows, weights, count, n, out);                                                                \
  }                                                                                                           \
  FM_MULTIVERSION float combine_row_backward(const T* grad, const T* row, float weight, int64_t n, T* out,    \
                                             bool stream) {                                                   \
    return scaled_row_and_dot(grad, row, weight, n, out, stream);                                             \
  }
FM_EXPERT_ROWS(float)
FM_EXPERT_ROWS(BFloat16)
FM_EXPERT_ROWS(Float16)
#undef FM_EXPERT_ROWS

}  // namespace
}  // namespace fm

// Rows of one token on the CPU: copies, the weighted sum of the rows of its experts, and the gradients of both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/multiversion.h"
#include "cpu/numbers.h"
#include "cpu/streaming.h"

namespace fm {
namespace {

constexpr int64_t kRowBlock = 256;   // columns of a gradient that are worked on together
constexpr int64_t kSumColumns = 64;  // columns that are summed together

// The rows of one token that are summed.
template <typename T>
struct TokenRows {
  const T** rows;
  float* weights;
  int64_t count;
};

// sums (+)= the sum over k < kRows of weights[k] * rows[k], in this order, for n columns from `begin` on.
template <int kRows, bool kFirst, typename T>
FM_INLINE void add_rows(const T* const* rows, const float* weights, int64_t begin, int64_t n, float* sums) {
  const T* row[kRows];
  float weight[kRows];
  for (int k = 0; k < kRows; ++k) {
    row[k] = rows[k] + begin;
    weight[k] = weights[k];
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    float sum = kFirst ? 0.0f : sums[j];
    for (int k = 0; k < kRows; ++k) sum += weight[k] * to_float(row[k][j]);
    sums[j] = sum;
  }
}

template <typename T>
FM_INLINE void sum_of_columns(const TokenRows<T>& token, const TokenRows<T>& next, int64_t begin, int64_t n, T* out) {
  float sums[kSumColumns];
  int64_t k = 0;
  for (; k + 4 <= token.count; k += 4) {
    for (int64_t ahead = k; ahead < std::min(k + 4, next.count); ++ahead) {
      prefetch_lines(next.rows[ahead] + begin, 0, n * sizeof(T));
    }
    if (k == 0) {
      add_rows<4, true>(token.rows, token.weights, begin, n, sums);
    } else {
      add_rows<4, false>(token.rows + k, token.weights + k, begin, n, sums);
    }
  }
  if (k == 0) std::fill(sums, sums + n, 0.0f);
  for (; k < token.count; ++k) add_rows<1, false>(token.rows + k, token.weights + k, begin, n, sums);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[begin + j] = from_float<T>(sums[j]);
}

// out = the sum over k of weights[k] * rows[k], in this order. Prefetches the rows of the next token.
template <typename T>
FM_INLINE void sum_of_rows(const TokenRows<T>& token, const TokenRows<T>& next, int64_t width, T* out) {
  int64_t begin = 0;
  for (; begin + kSumColumns <= width; begin += kSumColumns) sum_of_columns(token, next, begin, kSumColumns, out);
  if (begin < width) sum_of_columns(token, next, begin, width - begin, out);
}

// out = weight * grad unless out is null; adds the products of grad and y to the lanes unless y is null.
template <typename T>
FM_INLINE void backward_of_columns(const T* grad, const T* y, float weight, int64_t n, T* out, float* lanes) {
  if (y == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] = from_float<T>(weight * to_float(grad[j]));
  } else if (out == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) lanes[j] += to_float(grad[j]) * to_float(y[j]);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float g = to_float(grad[j]);
      lanes[j] += g * to_float(y[j]);
      out[j] = from_float<T>(weight * g);
    }
  }
}

// Writes out = weight * grad (past the caches if `stream`) unless out is null, and returns the dot product of grad and
// y (0 if y is null).
template <typename T>
FM_INLINE float scaled_row_and_dot(const T* grad, const T* y, float weight, int64_t n, T* out, bool stream) {
  constexpr int64_t kLanes = 32;  // sums that do not wait for each other; the same for every vector width
  alignas(kLineBytes) T buffer[kRowBlock];
  float lanes[kLanes];
#pragma omp simd
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = 0.0f;
  for (int64_t begin = 0; begin < n; begin += kRowBlock) {
    const int64_t width = std::min(kRowBlock, n - begin);
    T* to = out == nullptr ? nullptr : stream ? buffer : out + begin;
    for (int64_t j = 0; j < width; j += kLanes) {
      const T* of_y = y == nullptr ? nullptr : y + begin + j;
      T* of_out = to == nullptr ? nullptr : to + j;
      if (j + kLanes <= width) {
        backward_of_columns(grad + begin + j, of_y, weight, kLanes, of_out, lanes);
      } else {
        backward_of_columns(grad + begin + j, of_y, weight, width - j, of_out, lanes);
      }
    }
    if (stream) stream_copy(out + begin, buffer, width * sizeof(T));
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// target_clones takes no templates, so every combination is a plain function.
#define FM_EXPERT_ROWS(T)                                                                                     \
  FM_MULTIVERSION void combine_row(const TokenRows<T>& token, const TokenRows<T>& next, int64_t n, T* out) {  \
    sum_of_rows(token, next, n, out);                                                                         \
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

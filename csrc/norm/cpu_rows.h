// Rows of layer_norm (kCentred) and rms_norm on the CPU. T: x, y, dy, dx; S: residual, total, dtotal, dresidual.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/multiversion.h"
#include "cpu/numbers.h"
#include "cpu/sum.h"

namespace fm {

template <typename T, typename S, bool kCentred>
struct NormForwardRows {
  const T* x;
  const S* residual;  // null: none, and T is S
  const float* weight;
  const float* bias;  // unused unless kCentred
  T* y;
  S* total;
  float* means;
  float* rstds;
  int64_t rows, width;
  float eps;
};

template <typename T, typename S, bool kCentred>
struct NormBackwardRows {
  const T* dy;
  const S* x;       // the normalised input
  const S* dtotal;  // null: none
  const float* weight;
  const float* means;
  const float* rstds;
  T* dx;         // null: not wanted
  S* dresidual;  // null: not wanted
  float* dweight;  // null: sums are not wanted
  float* dbias;
  int64_t rows, width;
};

template <typename T, typename S>
FM_INLINE void add_rows(const T* __restrict x, const S* __restrict residual, S* __restrict total, int64_t width) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) total[j] = from_float<S>(to_float(x[j]) + to_float(residual[j]));
}

// A row is read up to three times, after the first from the cache: for its mean, its (centred) squares, its result.
template <typename T, typename S, bool kCentred>
FM_INLINE void normalise_row(const S* __restrict x, const float* __restrict weight, const float* __restrict bias,
                             float eps, T* __restrict y, float* mean_out, float* rstd_out, int64_t width) {
  float sum[1] = {0.0f}, squares[1];
  if constexpr (kCentred) {
    lane_sums(width, sum, [&](int64_t j, float* lane) __attribute__((always_inline)) { lane[0] += to_float(x[j]); });
  }
  const float mean = sum[0] / static_cast<float>(width);
  lane_sums(width, squares, [&](int64_t j, float* lane) __attribute__((always_inline)) {
    const float centred = kCentred ? to_float(x[j]) - mean : to_float(x[j]);
    lane[0] += centred * centred;
  });
  const float rstd = 1.0f / std::sqrt(squares[0] / static_cast<float>(width) + eps);
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    if constexpr (kCentred) {
      y[j] = from_float<T>((to_float(x[j]) - mean) * rstd * weight[j] + bias[j]);
    } else {
      y[j] = from_float<T>(to_float(x[j]) * rstd * weight[j]);
    }
  }
  if constexpr (kCentred) *mean_out = mean;
  *rstd_out = rstd;
}

template <typename T, typename S, bool kCentred>
FM_INLINE void normalise_rows(const NormForwardRows<T, S, kCentred>& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t at = row * a.width;
    const S* normalised = a.total + at;
    if (a.residual != nullptr) {
      add_rows(a.x + at, a.residual + at, a.total + at, a.width);
    } else if constexpr (std::is_same_v<T, S>) {
      normalised = a.x + at;
    }
    normalise_row<T, S, kCentred>(normalised, a.weight, a.bias, a.eps, a.y + at, kCentred ? a.means + row : nullptr,
                                  a.rstds + row, a.width);
  }
}

// The loop that sums g = dy * weight (if centred) and g * normalised over a row also adds to dweight and dbias, in
// float32, while the row is in the cache.
template <typename T, typename S, bool kCentred>
FM_INLINE void backward_sums(const T* __restrict dy, const S* __restrict x, const float* __restrict weight, float mean,
                             float rstd, float* __restrict dweight, float* __restrict dbias, int64_t width,
                             float (&sums)[kCentred ? 2 : 1]) {
  const auto add = [&](int64_t j, float* lane, auto gather) __attribute__((always_inline)) {
    const float upstream = to_float(dy[j]);
    const float normalised = (kCentred ? to_float(x[j]) - mean : to_float(x[j])) * rstd;
    if constexpr (gather.value) {
      dweight[j] += upstream * normalised;
      if constexpr (kCentred) dbias[j] += upstream;
    }
    const float g = upstream * weight[j];
    lane[0] += g * normalised;
    if constexpr (kCentred) lane[kSumLanes] += g;
  };
  if (dweight != nullptr) {
    lane_sums(width, sums, [&](int64_t j, float* lane) __attribute__((always_inline)) {
      add(j, lane, std::true_type());
    });
  } else {
    lane_sums(width, sums, [&](int64_t j, float* lane) __attribute__((always_inline)) {
      add(j, lane, std::false_type());
    });
  }
}

template <typename Out, typename T, typename S, bool kCentred>
FM_INLINE void backward_result(const T* __restrict dy, const S* __restrict x, const S* __restrict dtotal,
                               const float* __restrict weight, float mean, float rstd, float mean_g,
                               float mean_projection, Out* __restrict out, int64_t width) {
  const auto gradient = [&](int64_t j) __attribute__((always_inline)) {
    const float normalised = (kCentred ? to_float(x[j]) - mean : to_float(x[j])) * rstd;
    const float g = to_float(dy[j]) * weight[j];
    return rstd * ((kCentred ? g - mean_g : g) - normalised * mean_projection);
  };
  if (dtotal == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) out[j] = from_float<Out>(gradient(j));
  } else {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) out[j] = from_float<Out>(gradient(j) + to_float(dtotal[j]));
  }
}

template <typename T, typename S, bool kCentred>
FM_INLINE void backward_rows(const NormBackwardRows<T, S, kCentred>& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t at = row * a.width;
    const float mean = kCentred ? a.means[row] : 0.0f, rstd = a.rstds[row];
    float sums[kCentred ? 2 : 1];
    backward_sums<T, S, kCentred>(a.dy + at, a.x + at, a.weight, mean, rstd, a.dweight, a.dbias, a.width, sums);
    const float mean_projection = sums[0] / static_cast<float>(a.width);
    const float mean_g = kCentred ? sums[kCentred ? 1 : 0] / static_cast<float>(a.width) : 0.0f;
    const S* dtotal = a.dtotal == nullptr ? nullptr : a.dtotal + at;
    if (a.dx != nullptr) {
      backward_result<T, T, S, kCentred>(a.dy + at, a.x + at, dtotal, a.weight, mean, rstd, mean_g, mean_projection,
                                         a.dx + at, a.width);
    }
    if constexpr (!std::is_same_v<T, S>) {
      if (a.dresidual != nullptr) {
        backward_result<S, T, S, kCentred>(a.dy + at, a.x + at, dtotal, a.weight, mean, rstd, mean_g, mean_projection,
                                           a.dresidual + at, a.width);
      }
    }
  }
}

}  // namespace fm

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "cpu_column_sums.h"
#include "cpu_numbers.h"
#include "cpu_parameter.h"
#include "cpu_sum.h"
#include "layer_norm_shapes.h"
#include "multiversion.h"
#include "tensor_checks.h"

namespace fm {
namespace {

// A row is read three times, the last two from the cache: its mean, its centred squares, its result.
template <typename T>
FM_INLINE void forward_rows(const T* __restrict x, const float* __restrict weight, const float* __restrict bias,
                            float eps, T* __restrict y, float* __restrict means, float* __restrict rstds, int64_t rows,
                            int64_t width) {
  for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
    float sum[1], squares[1];
    lane_sums(width, sum, [&](int64_t j, float* lane) __attribute__((always_inline)) { lane[0] += to_float(x[j]); });
    const float mean = sum[0] / static_cast<float>(width);
    lane_sums(width, squares, [&](int64_t j, float* lane) __attribute__((always_inline)) {
      const float centred = to_float(x[j]) - mean;
      lane[0] += centred * centred;
    });
    const float rstd = 1.0f / std::sqrt(squares[0] / static_cast<float>(width) + eps);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      y[j] = from_float<T>((to_float(x[j]) - mean) * rstd * weight[j] + bias[j]);
    }
    means[row] = mean;
    rstds[row] = rstd;
  }
}

// dweight and dbias gather in float32 while a row passes through the cache for its two sums; dx is a second pass over it.
template <typename T>
FM_INLINE void backward_rows(const T* __restrict dy, const T* __restrict x, const float* __restrict weight,
                             const float* __restrict means, const float* __restrict rstds, T* __restrict dx,
                             float* __restrict dweight, float* __restrict dbias, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, x += width, dy += width) {
    const float mean = means[row], rstd = rstds[row];
    float sums[2];  // of g = dy * weight and of g * normalised
    if (dweight != nullptr) {
      lane_sums(width, sums, [&](int64_t j, float* lane) __attribute__((always_inline)) {
        const float upstream = to_float(dy[j]);
        const float normalised = (to_float(x[j]) - mean) * rstd;
        dweight[j] += upstream * normalised;
        dbias[j] += upstream;
        const float g = upstream * weight[j];
        lane[0] += g;
        lane[kSumLanes] += g * normalised;
      });
    } else {
      lane_sums(width, sums, [&](int64_t j, float* lane) __attribute__((always_inline)) {
        const float g = to_float(dy[j]) * weight[j];
        lane[0] += g;
        lane[kSumLanes] += g * ((to_float(x[j]) - mean) * rstd);
      });
    }
    if (dx == nullptr) continue;
    const float mean_g = sums[0] / static_cast<float>(width), mean_projection = sums[1] / static_cast<float>(width);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const float normalised = (to_float(x[j]) - mean) * rstd;
      dx[j] = from_float<T>(rstd * (to_float(dy[j]) * weight[j] - mean_g - normalised * mean_projection));
    }
    dx += width;
  }
}

// target_clones takes no templates, so every dtype is a plain function.
#define FM_LAYER_NORM(T)                                                                                           \
  FM_MULTIVERSION void forward_##T(const T* x, const float* weight, const float* bias, float eps, T* y,            \
                                   float* means, float* rstds, int64_t rows, int64_t width) {                      \
    forward_rows<T>(x, weight, bias, eps, y, means, rstds, rows, width);                                           \
  }                                                                                                                \
  FM_MULTIVERSION void backward_##T(const T* dy, const T* x, const float* weight, const float* means,              \
                                    const float* rstds, T* dx, float* dweight, float* dbias, int64_t rows,         \
                                    int64_t width) {                                                               \
    backward_rows<T>(dy, x, weight, means, rstds, dx, dweight, dbias, rows, width);                                \
  }                                                                                                                \
  constexpr auto forward_of(T) { return &forward_##T; }                                                            \
  constexpr auto backward_of(T) { return &backward_##T; }
FM_LAYER_NORM(float)
FM_LAYER_NORM(BFloat16)
FM_LAYER_NORM(Float16)
#undef FM_LAYER_NORM

constexpr int64_t kGrainElements = 16384;

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x_any, const OptionalTensor& weight_any,
                                                      const OptionalTensor& bias_any, double eps) {
  const int64_t width = layer_norm_width(x_any);
  const Tensor x = made_contiguous(x_any);
  const OptionalTensor weight = checked_parameter(weight_any, x, "weight");
  const OptionalTensor bias = checked_parameter(bias_any, x, "bias");
  const int64_t rows = x.numel() / width;
  Tensor y = empty(Sizes(x), x.scalar_type(), x);
  const Sizes row_sizes(x, 1);
  Tensor mean = empty(row_sizes, ScalarType::Float, x), rstd = empty(row_sizes, ScalarType::Float, x);
  const FloatParameter weight_float(weight, width, 1.0f), bias_float(bias, width, 0.0f);
  float* means = static_cast<float*>(mean.mutable_data_ptr());
  float* rstds = static_cast<float*>(rstd.mutable_data_ptr());
  for_cpu_dtype(x.scalar_type(), [&]<typename T>(T element) {
    const T* x_data = static_cast<const T*>(x.const_data_ptr());
    T* y_data = static_cast<T*>(y.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, kGrainElements / width);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
      forward_of(element)(x_data + first * width, weight_float.data(), bias_float.data(), static_cast<float>(eps),
                          y_data + first * width, means + first, rstds + first, last - first, width);
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy_any, const Tensor& x_any,
                                                       const OptionalTensor& weight_any,
                                                       const OptionalTensor& bias_any, const Tensor& mean_any,
                                                       const Tensor& rstd_any, bool need_dx, bool need_dweight,
                                                       bool need_dbias) {
  const LayerNormBackwardInputs in(dy_any, x_any, weight_any, bias_any, mean_any, rstd_any);
  const Tensor &x = in.x, &dy = in.dy;
  const OptionalTensor &weight = in.weight, &bias = in.bias;
  const int64_t rows = in.rows, width = in.width;
  need_dweight = need_dweight && weight.has_value();
  need_dbias = need_dbias && bias.has_value();
  const bool need_sums = need_dweight || need_dbias;
  Tensor dx = need_dx ? empty(Sizes(x), x.scalar_type(), x) : nothing(x);
  Tensor dweight = need_dweight ? empty(Sizes(*weight), weight->scalar_type(), x) : nothing(x);
  Tensor dbias = need_dbias ? empty(Sizes(*bias), bias->scalar_type(), x) : nothing(x);
  if (!need_dx && !need_sums) return {dx, dweight, dbias};

  const FloatParameter weight_float(weight, width, 1.0f);
  const float* means = static_cast<const float*>(in.mean.const_data_ptr());
  const float* rstds = static_cast<const float*>(in.rstd.const_data_ptr());
  const int64_t parts = row_parts(rows);
  // One row of partial sums of dweight, then one of dbias, for every part.
  const Scratch partials = make_scratch(need_sums ? 2 * parts * width : 0);
  for_cpu_dtype(x.scalar_type(), [&]<typename T>(T element) {
    const T* dy_data = static_cast<const T*>(dy.const_data_ptr());
    const T* x_data = static_cast<const T*>(x.const_data_ptr());
    T* dx_data = need_dx ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr;
    const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, x.numel() / parts));
    torch::stable::parallel_for(0, parts, grain, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        const int64_t begin = part_begin(part, parts, rows), end = part_begin(part + 1, parts, rows);
        float* sums = need_sums ? partials.get() + 2 * part * width : nullptr;
        if (need_sums) std::fill(sums, sums + 2 * width, 0.0f);
        backward_of(element)(dy_data + begin * width, x_data + begin * width, weight_float.data(), means + begin,
                             rstds + begin, need_dx ? dx_data + begin * width : nullptr, sums,
                             need_sums ? sums + width : nullptr, end - begin, width);
      }
    });
  });
  const auto finish = [&](const Tensor& sums_out, int64_t offset) {
    for_cpu_dtype(sums_out.scalar_type(), [&]<typename T>(T) {
      T* out = static_cast<T*>(sums_out.mutable_data_ptr());
      finish_column_sums(partials.get() + offset, parts, width, 2 * width,
                         [&](int64_t j, float sum) { out[j] = from_float<T>(sum); });
    });
  };
  if (need_dweight) finish(dweight, 0);
  if (need_dbias) finish(dbias, width);
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&fm::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&fm::layer_norm_backward));
}

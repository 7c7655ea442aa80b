#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu_column_sums.h"
#include "cpu_math.h"
#include "cpu_numbers.h"
#include "cpu_parameter.h"
#include "multiversion.h"
#include "tensor_checks.h"

#define FM_GELU FM_INLINE
namespace fm {
namespace {

FM_INLINE float gelu_exp(float x) { return exp_vectorised(x); }
FM_INLINE float gelu_reciprocal(float x) { return 1.0f / x; }

// The normal distribution function; density_exp is exp(-u^2 / 2). Abramowitz and Stegun 7.1.26, error 1.5e-7.
FM_INLINE float gelu_normal_cdf(float u, float density_exp) {
  const float z = (u < 0.0f ? -u : u) * 0.7071067811865476f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float half_erfc = 0.5f * p * t * density_exp;
  return u < 0.0f ? half_erfc : 1.0f - half_erfc;
}

}  // namespace
}  // namespace fm
#include "gelu.h"

namespace fm {
namespace {

template <typename T, bool kTanh>
FM_INLINE void forward_segment(const T* __restrict x, const float* __restrict bias, T* __restrict y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = from_float<T>(gelu<kTanh>(to_float(x[i]) + bias[i]));
}

template <typename T, bool kTanh>
FM_INLINE void backward_segment(const T* __restrict dy, const T* __restrict x, const float* __restrict bias,
                                T* __restrict dx, float* __restrict sums, int64_t n) {
  if (dx != nullptr && sums != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float du = to_float(dy[i]) * gelu_slope<kTanh>(to_float(x[i]) + bias[i]);
      sums[i] += du;
      dx[i] = from_float<T>(du);
    }
  } else if (dx != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      dx[i] = from_float<T>(to_float(dy[i]) * gelu_slope<kTanh>(to_float(x[i]) + bias[i]));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += to_float(dy[i]) * gelu_slope<kTanh>(to_float(x[i]) + bias[i]);
  }
}

// target_clones takes no templates, so every combination is a plain function.
#define FM_BIAS_GELU(T, kTanh)                                                                                     \
  FM_MULTIVERSION void forward_##T##_##kTanh(const T* x, const float* bias, T* y, int64_t n) {                     \
    forward_segment<T, kTanh>(x, bias, y, n);                                                                      \
  }                                                                                                                \
  FM_MULTIVERSION void backward_##T##_##kTanh(const T* dy, const T* x, const float* bias, T* dx, float* sums,      \
                                              int64_t n) {                                                         \
    backward_segment<T, kTanh>(dy, x, bias, dx, sums, n);                                                          \
  }                                                                                                                \
  void forward(const T* x, const float* bias, T* y, int64_t n, std::bool_constant<kTanh>) {                        \
    forward_##T##_##kTanh(x, bias, y, n);                                                                          \
  }                                                                                                                \
  void backward(const T* dy, const T* x, const float* bias, T* dx, float* sums, int64_t n,                         \
                std::bool_constant<kTanh>) {                                                                       \
    backward_##T##_##kTanh(dy, x, bias, dx, sums, n);                                                              \
  }
FM_BIAS_GELU(float, true)
FM_BIAS_GELU(float, false)
FM_BIAS_GELU(BFloat16, true)
FM_BIAS_GELU(BFloat16, false)
FM_BIAS_GELU(Float16, true)
FM_BIAS_GELU(Float16, false)
#undef FM_BIAS_GELU

// Small enough that a block of bias, sums and rows stays in the first-level cache.
constexpr int64_t kColumnBlock = 1024;
constexpr int64_t kGrainElements = 16384;

// x as [rows, width]; without a bias the whole of x may be cut anywhere, so it is cut into rows of kColumnBlock.
struct Layout {
  int64_t rows, width;
  Layout(const Tensor& x, bool has_bias) {
    const int64_t count = x.numel();
    width = has_bias ? x.size(x.dim() - 1) : std::max<int64_t>(1, std::min(count, kColumnBlock));
    rows = width > 0 ? (count + width - 1) / width : 0;
  }
};

template <typename F>
void for_dtype_and_form(ScalarType dtype, bool tanh, const F& f) {
  for_cpu_dtype(dtype, [&]<typename T>(T element) {
    if (tanh) {
      f(element, std::true_type{});
    } else {
      f(element, std::false_type{});
    }
  });
}

Tensor bias_gelu_forward(const Tensor& x_any, const OptionalTensor& bias_any, bool tanh) {
  check_kernel_dtype(x_any, "x");
  const Tensor x = made_contiguous(x_any);
  const OptionalTensor bias = checked_parameter(bias_any, x, "bias");
  Tensor y = empty(Sizes(x), x.scalar_type(), x);
  const int64_t count = x.numel();
  if (count == 0) return y;
  const Layout layout(x, bias.has_value());
  const FloatParameter bias_float(bias, layout.width, 0.0f);
  for_dtype_and_form(x.scalar_type(), tanh, [&]<typename T>(T, auto form) {
    const T* x_data = static_cast<const T*>(x.const_data_ptr());
    T* y_data = static_cast<T*>(y.mutable_data_ptr());
    torch::stable::parallel_for(0, count, kGrainElements, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const int64_t column = i % layout.width;
        const int64_t n = std::min(layout.width - column, end - i);
        forward(x_data + i, bias_float.data() + column, y_data + i, n, form);
        i += n;
      }
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& dy_any, const Tensor& x_any,
                                              const OptionalTensor& bias_any, bool tanh, bool need_dx,
                                              bool need_dbias) {
  check_kernel_dtype(x_any, "x");
  STD_TORCH_CHECK(dy_any.scalar_type() == x_any.scalar_type() && dy_any.numel() == x_any.numel() &&
                      on_same_device(dy_any, x_any),
                  "dy must have the dtype, shape and device of x");
  const Tensor x = made_contiguous(x_any), dy = made_contiguous(dy_any);
  const OptionalTensor bias = checked_parameter(bias_any, x, "bias");
  need_dbias = need_dbias && bias.has_value();
  Tensor dx = need_dx ? empty(Sizes(x), x.scalar_type(), x) : nothing(x);
  Tensor dbias = need_dbias ? empty(Sizes(*bias), bias->scalar_type(), x) : nothing(x);
  const int64_t count = x.numel();
  const Layout layout(x, bias.has_value());
  const int64_t rows = layout.rows, width = layout.width;
  const FloatParameter bias_float(bias, width, 0.0f);
  const int64_t parts = row_parts(rows);
  const int64_t blocks = (width + kColumnBlock - 1) / kColumnBlock;
  const Scratch partials = make_scratch(need_dbias ? parts * width : 0);
  for_dtype_and_form(x.scalar_type(), tanh, [&]<typename T>(T, auto form) {
    const T* dy_data = static_cast<const T*>(dy.const_data_ptr());
    const T* x_data = static_cast<const T*>(x.const_data_ptr());
    T* dx_data = need_dx ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr;
    if (!need_dx && !need_dbias) return;
    const int64_t elements_per_task = std::max<int64_t>(1, count / std::max<int64_t>(1, parts * blocks));
    const int64_t grain = std::max<int64_t>(1, kGrainElements / elements_per_task);
    torch::stable::parallel_for(0, parts * blocks, grain, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t part = task / blocks, column = task % blocks * kColumnBlock;
        const int64_t columns = std::min(kColumnBlock, width - column);
        float* sums = need_dbias ? partials.get() + part * width + column : nullptr;
        if (need_dbias) std::fill(sums, sums + columns, 0.0f);
        for (int64_t row = part_begin(part, parts, rows); row < part_begin(part + 1, parts, rows); ++row) {
          const int64_t i = row * width + column;
          const int64_t n = std::min(columns, count - i);  // without a bias the last row may be short
          backward(dy_data + i, x_data + i, bias_float.data() + column, need_dx ? dx_data + i : nullptr, sums, n,
                   form);
        }
      }
    });
  });
  if (need_dbias) {
    for_cpu_dtype(bias->scalar_type(), [&]<typename T>(T) {
      T* out = static_cast<T*>(dbias.mutable_data_ptr());
      finish_column_sums(partials.get(), parts, width, width, [&](int64_t j, float sum) { out[j] = from_float<T>(sum); });
    });
  }
  return {dx, dbias};
}

}  // namespace
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) {
  m.impl("bias_gelu_forward", TORCH_BOX(&fm::bias_gelu_forward));
  m.impl("bias_gelu_backward", TORCH_BOX(&fm::bias_gelu_backward));
}

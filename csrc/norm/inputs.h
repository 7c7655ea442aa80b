// Checks of the tensors of layer_norm and rms_norm, the same for the CPU and the CUDA kernels.
//
// T: the dtype of x, y, dy and dx; S: the dtype of the stream that is normalised: residual, total, dtotal and
// dresidual. Without a residual both are the dtype of x.
#pragma once

#include "tensor_checks.h"

namespace fm {

inline void check_stream_dtype(ScalarType stream, ScalarType dtype, const char* name, const char* other) {
  STD_TORCH_CHECK(stream == dtype || stream == ScalarType::Float, name, " must be float32 or of the dtype of ", other);
}

inline void check_same_shape(const Tensor& tensor, const Tensor& other, const char* message) {
  bool same = tensor.dim() == other.dim() && on_same_device(tensor, other);
  for (int64_t i = 0; same && i < tensor.dim(); ++i) same = tensor.size(i) == other.size(i);
  STD_TORCH_CHECK(same, message);
}

inline int64_t norm_width(const Tensor& x) {
  check_kernel_dtype(x, "x");
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) > 0, "x must have a last dim of at least 1");
  return x.size(x.dim() - 1);
}

struct NormForwardInputs {
  Tensor x;
  OptionalTensor weight, bias, residual;
  int64_t rows, width;

  NormForwardInputs(const Tensor& x_any, const OptionalTensor& weight_any, const OptionalTensor& bias_any,
                    const OptionalTensor& residual_any)
      : x(made_contiguous(x_any)),
        weight(checked_parameter(weight_any, x, "weight")),
        bias(checked_parameter(bias_any, x, "bias")),
        rows(0),
        width(norm_width(x)) {
    rows = x.numel() / width;
    if (!residual_any) return;
    check_stream_dtype(residual_any->scalar_type(), x.scalar_type(), "residual", "x");
    check_same_shape(*residual_any, x, "residual must have the shape and device of x");
    residual = made_contiguous(*residual_any);
  }
};

struct NormBackwardInputs {
  Tensor dy, x, rstd;
  OptionalTensor weight, bias, mean, dtotal;
  int64_t rows, width;

  NormBackwardInputs(const Tensor& dy_any, const Tensor& x_any, const OptionalTensor& weight_any,
                     const OptionalTensor& bias_any, const OptionalTensor& mean_any, const Tensor& rstd_any,
                     const OptionalTensor& dtotal_any, bool need_dresidual)
      : dy(made_contiguous(dy_any)),
        x(made_contiguous(x_any)),
        rstd(made_contiguous(rstd_any)),
        weight(checked_parameter(weight_any, x, "weight")),
        bias(checked_parameter(bias_any, x, "bias")),
        rows(0),
        width(norm_width(x)) {
    rows = x.numel() / width;
    check_kernel_dtype(dy, "dy");
    check_stream_dtype(x.scalar_type(), dy.scalar_type(), "x", "dy");
    check_same_shape(dy, x, "dy must have the shape and device of x");
    check_statistic(rstd);
    if (mean_any) check_statistic(mean.emplace(made_contiguous(*mean_any)));
    if (dtotal_any) {
      STD_TORCH_CHECK(dtotal_any->scalar_type() == x.scalar_type(), "dtotal must have the dtype of x");
      check_same_shape(*dtotal_any, x, "dtotal must have the shape and device of x");
      dtotal = made_contiguous(*dtotal_any);
    }
    STD_TORCH_CHECK(!need_dresidual || dy.scalar_type() != x.scalar_type(),
                    "dresidual is dx where x and dy have one dtype: ask for dx");
  }

  void check_statistic(const Tensor& statistic) const {
    STD_TORCH_CHECK(statistic.scalar_type() == ScalarType::Float && statistic.numel() == rows &&
                        on_same_device(statistic, x),
                    "mean and rstd must be float32, one for every row of x, on the device of x");
  }
};

}  // namespace fm

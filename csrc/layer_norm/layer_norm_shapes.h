#pragma once

#include "tensor_checks.h"

// What the CPU and the CUDA layer norm check alike.
namespace fm {

inline int64_t layer_norm_width(const Tensor& x) {
  check_kernel_dtype(x, "x");
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) > 0, "x must have a last dim of at least 1");
  const int64_t width = x.size(x.dim() - 1);
  // A block a row: the most blocks that a CUDA grid holds.
  STD_TORCH_CHECK(!x.is_cuda() || x.numel() / width <= 0x7FFFFFFF, "x must have fewer than 2^31 rows on a GPU");
  return width;
}

struct LayerNormBackwardInputs {
  Tensor x, dy, mean, rstd;
  OptionalTensor weight, bias;
  int64_t rows, width;

  LayerNormBackwardInputs(const Tensor& dy_any, const Tensor& x_any, const OptionalTensor& weight_any,
                          const OptionalTensor& bias_any, const Tensor& mean_any, const Tensor& rstd_any)
      : x(made_contiguous(x_any)),
        dy(made_contiguous(dy_any)),
        mean(made_contiguous(mean_any)),
        rstd(made_contiguous(rstd_any)),
        weight(checked_parameter(weight_any, x, "weight")),
        bias(checked_parameter(bias_any, x, "bias")),
        rows(0),
        width(layer_norm_width(x)) {
    rows = x.numel() / width;
    STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type() && dy.numel() == x.numel() && on_same_device(dy, x),
                    "dy must have the dtype, shape and device of x");
    for (const Tensor* statistic : {&mean, &rstd}) {
      STD_TORCH_CHECK(statistic->scalar_type() == ScalarType::Float && statistic->numel() == rows &&
                          on_same_device(*statistic, x),
                      "mean and rstd must be float32, one for every row of x, on the device of x");
    }
  }
};

}  // namespace fm

// Tensors of weighted_swiglu: checks and outputs, for the CPU and the CUDA kernels.
#pragma once

#include "tensor_checks.h"

namespace fm {

struct WeightedSwigluForward {
  Tensor x, weight, y;
};

inline void check_weighted_swiglu(const Tensor& x, const Tensor& weight) {
  check_kernel_dtype(x, "x");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) % 2 == 0, "x must be [N, 2 F]");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(0) && weight.scalar_type() == ScalarType::Float &&
                      on_same_device(weight, x),
                  "weight must be float32 [N] on the device of x");
}

inline WeightedSwigluForward weighted_swiglu_forward_tensors(const Tensor& x, const Tensor& weight) {
  check_weighted_swiglu(x, weight);
  const int64_t sizes[] = {x.size(0), x.size(1) / 2};
  return {made_contiguous(x), made_contiguous(weight), empty(sizes, x.scalar_type(), x)};
}

// y is empty where it is not needed.
struct WeightedSwigluBackward {
  Tensor dy, x, weight, dx, dweight, y;
};

inline WeightedSwigluBackward weighted_swiglu_backward_tensors(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                               bool need_y) {
  check_weighted_swiglu(x, weight);
  STD_TORCH_CHECK(dy.dim() == 2 && dy.size(0) == x.size(0) && 2 * dy.size(1) == x.size(1) &&
                      dy.scalar_type() == x.scalar_type() && on_same_device(dy, x),
                  "dy must be [N, F] in the dtype and on the device of x");
  return {made_contiguous(dy),
          made_contiguous(x),
          made_contiguous(weight),
          empty(Sizes(x), x.scalar_type(), x),
          empty(Sizes(weight), ScalarType::Float, x),
          need_y ? empty(Sizes(dy), x.scalar_type(), x) : nothing(x)};
}

}  // namespace fm

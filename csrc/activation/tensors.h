// Tensors of bias_gelu, bias_swiglu and bias_geglu: checks, shapes and outputs, for the CPU and the CUDA kernels.
//
// A gated activation takes x [..., 2F], the gate first, and returns [..., F].
#pragma once

#include <tuple>

#include "tensor_checks.h"

namespace fm {

inline constexpr int kMaxHalves = 2;
template <bool kGated>
inline constexpr int kHalves = kGated ? 2 : 1;

// The sizes of y, from x.
template <bool kGated>
Sizes activation_sizes(const Tensor& x) {
  Sizes sizes(x);
  if (kGated) {
    STD_TORCH_CHECK(sizes.count > 0 && sizes.values[sizes.count - 1] % 2 == 0, "the last dim of x must be even");
    sizes.values[sizes.count - 1] /= 2;
  }
  return sizes;
}

struct ActivationForward {
  Tensor x, y;
  OptionalTensor bias;
};

template <bool kGated>
ActivationForward activation_forward_tensors(const Tensor& x, const OptionalTensor& bias) {
  check_kernel_dtype(x, "x");
  return {made_contiguous(x), empty(activation_sizes<kGated>(x), x.scalar_type(), x),
          checked_parameter(bias, x, "bias")};
}

// dx and dbias are empty where they are not needed.
struct ActivationBackward {
  Tensor dy, x, dx, dbias;
  OptionalTensor bias;
  bool need_dx, need_dbias;
};

template <bool kGated>
ActivationBackward activation_backward_tensors(const Tensor& dy, const Tensor& x, const OptionalTensor& bias_any,
                                               bool need_dx, bool need_dbias) {
  check_kernel_dtype(x, "x");
  activation_sizes<kGated>(x);
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type() && dy.numel() * kHalves<kGated> == x.numel() &&
                      on_same_device(dy, x),
                  "dy must have the dtype and device of x, and the shape of the output");
  const OptionalTensor bias = checked_parameter(bias_any, x, "bias");
  need_dbias = need_dbias && bias.has_value();
  return {made_contiguous(dy),
          made_contiguous(x),
          need_dx ? empty(Sizes(x), x.scalar_type(), x) : nothing(x),
          need_dbias ? empty(Sizes(*bias), bias->scalar_type(), x) : nothing(x),
          bias,
          need_dx,
          need_dbias};
}

// x as [rows, kHalves * width]. Without bias and gate rows may be cut anywhere: the width is `free_width`, and the last
// row may be short.
struct ActivationLayout {
  int64_t count, width, rows;  // count: elements of y
};
template <bool kGated>
ActivationLayout activation_layout(const Tensor& x, bool has_bias, int64_t free_width) {
  const int64_t count = x.numel() / kHalves<kGated>;
  const int64_t width = kGated || has_bias ? x.size(x.dim() - 1) / kHalves<kGated> : free_width;
  return {count, width, width > 0 ? (count + width - 1) / width : 0};
}

}  // namespace fm

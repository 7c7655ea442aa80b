#include <tuple>

#include "bias_gelu_kernels.cuh"
#include "launch_checks.h"

namespace fm {
namespace {

int64_t width_of(const Tensor& x, const OptionalTensor& bias) {
  return bias ? x.size(x.dim() - 1) : kWidthWithoutBias;
}

Tensor bias_gelu_forward(const Tensor& x_any, const OptionalTensor& bias_any, bool tanh) {
  check_kernel_dtype(x_any, "x");
  const DeviceGuard guard(x_any.get_device());
  const Tensor x = made_contiguous(x_any);
  const OptionalTensor bias = checked_parameter(bias_any, x, "bias");
  Tensor y = empty(Sizes(x), x.scalar_type(), x);
  BiasGelu a{};
  a.dtype = device_dtype(x.scalar_type());
  a.tanh = tanh;
  a.x = x.const_data_ptr();
  a.bias = const_parameter(bias);
  a.count = x.numel();
  a.width = width_of(x, bias);
  a.y = y.mutable_data_ptr();
  launch_bias_gelu_forward(a, current_stream(x));
  check_launch("bias_gelu_forward");
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& dy_any, const Tensor& x_any,
                                              const OptionalTensor& bias_any, bool tanh, bool need_dx,
                                              bool need_dbias) {
  check_kernel_dtype(x_any, "x");
  STD_TORCH_CHECK(dy_any.scalar_type() == x_any.scalar_type() && dy_any.numel() == x_any.numel() &&
                      on_same_device(dy_any, x_any),
                  "dy must have the dtype, shape and device of x");
  const DeviceGuard guard(x_any.get_device());
  const Tensor x = made_contiguous(x_any), dy = made_contiguous(dy_any);
  const OptionalTensor bias = checked_parameter(bias_any, x, "bias");
  need_dbias = need_dbias && bias.has_value();
  Tensor dx = need_dx ? empty(Sizes(x), x.scalar_type(), x) : nothing(x);
  Tensor dbias = need_dbias ? empty(Sizes(*bias), bias->scalar_type(), x) : nothing(x);
  BiasGelu a{};
  a.dtype = device_dtype(x.scalar_type());
  a.tanh = tanh;
  a.x = x.const_data_ptr();
  a.bias = const_parameter(bias);
  a.count = x.numel();
  a.width = width_of(x, bias);
  if (a.width == 0 || (!need_dbias && (!need_dx || a.count == 0))) return {dx, dbias};
  a.dy = dy.const_data_ptr();
  a.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  a.parts = bias_gelu_parts(a, multiprocessors());
  const int64_t partial_sizes[] = {need_dbias ? a.parts * a.width : 0};
  Tensor partials = empty(partial_sizes, ScalarType::Float, x);
  a.partials = need_dbias ? static_cast<float*>(partials.mutable_data_ptr()) : nullptr;
  a.dbias = mutable_parameter(dbias, need_dbias);
  launch_bias_gelu_backward(a, current_stream(x));
  check_launch("bias_gelu_backward");
  return {dx, dbias};
}

}  // namespace
}  // namespace fm

FM_CUDA_LIBRARY_IMPL(m) {
  m.impl("bias_gelu_forward", TORCH_BOX(&fm::bias_gelu_forward));
  m.impl("bias_gelu_backward", TORCH_BOX(&fm::bias_gelu_backward));
}

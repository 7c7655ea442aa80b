// bias_gelu, bias_swiglu and bias_geglu on the GPU: the functions from tensors to tensors.
#pragma once

#include <tuple>

#include "activation/kernels.cuh"
#include "activation/tensors.h"
#include "cuda/launch_checks.h"

namespace fm {

template <bool kGated>
ActivationArguments activation_arguments(const Tensor& x, const OptionalTensor& bias) {
  const ActivationLayout layout = activation_layout<kGated>(x, bias.has_value(), kWidthWithoutBias);
  ActivationArguments a{};
  a.dtype = device_dtype(x.scalar_type());
  a.x = x.const_data_ptr();
  a.bias = const_parameter(bias);
  a.count = layout.count;
  a.width = layout.width;
  return a;
}

template <typename Activation, bool kGated>
Tensor activation_forward(const Tensor& x, const OptionalTensor& bias) {
  const DeviceGuard guard(x.get_device());
  const auto t = activation_forward_tensors<kGated>(x, bias);
  ActivationArguments a = activation_arguments<kGated>(t.x, t.bias);
  if (a.count == 0) return t.y;
  a.y = t.y.mutable_data_ptr();
  launch_activation_forward<Activation, kGated>(a, multiprocessors(), current_stream(t.x));
  check_launch("activation_forward");
  return t.y;
}

template <typename Activation, bool kGated>
std::tuple<Tensor, Tensor> activation_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& bias,
                                               bool need_dx, bool need_dbias) {
  const DeviceGuard guard(x.get_device());
  const auto t = activation_backward_tensors<kGated>(dy, x, bias, need_dx, need_dbias);
  ActivationArguments a = activation_arguments<kGated>(t.x, t.bias);
  if (a.width == 0 || (!t.need_dbias && (!t.need_dx || a.count == 0))) return {t.dx, t.dbias};
  a.dy = t.dy.const_data_ptr();
  a.dx = t.need_dx ? t.dx.mutable_data_ptr() : nullptr;
  a.shares = activation_shares<kGated>(a, t.need_dbias, multiprocessors());
  const int64_t partial_sizes[] = {t.need_dbias ? a.shares.blocks * kHalves<kGated> * a.width : 0};
  const Tensor partials = empty(partial_sizes, ScalarType::Float, t.x);
  a.partials = t.need_dbias ? static_cast<float*>(partials.mutable_data_ptr()) : nullptr;
  a.dbias = mutable_parameter(t.dbias, t.need_dbias);
  launch_activation_backward<Activation, kGated>(a, current_stream(t.x));
  check_launch("activation_backward");
  return {t.dx, t.dbias};
}

}  // namespace fm

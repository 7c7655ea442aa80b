// bias_dropout_add on the GPU: the functions from tensors to tensors.
#include <tuple>

#include "bias_dropout_add_launch.cuh"
#include "cuda/launch_checks.h"

namespace fm {
namespace {

BiasDropoutAdd arguments(const Tensor& x, ScalarType x_dtype, ScalarType dtype, const OptionalTensor& bias,
                         const OptionalTensor& rng_state, double p, const GlobalRows& rows) {
  STD_TORCH_CHECK(is_kernel_dtype(x_dtype) && (x_dtype == dtype || dtype == ScalarType::Float),
                  "residual must have the dtype of x or be float32");
  const bool random = p > 0.0 && p < 1.0;
  STD_TORCH_CHECK(!random || (rng_state && rng_state->scalar_type() == ScalarType::Long && rng_state->numel() == 2 &&
                              rng_state->is_contiguous() && on_same_device(*rng_state, x)),
                  "rng_state must be two int64 on the device of x");
  BiasDropoutAdd a{};
  a.x_dtype = device_dtype(x_dtype);
  a.dtype = device_dtype(dtype);
  a.count = x.numel();
  const int64_t last = x.dim() > 0 ? x.size(x.dim() - 1) : 1;
  a.width = bias || rows.inner != 0 ? last : kDropoutWidthOfWhole;
  a.rows = rows;
  a.rng_state = random ? static_cast<const int64_t*>(rng_state->const_data_ptr()) : nullptr;
  a.threshold = random ? dropout_threshold(p) << 16 : 0;
  a.scale = dropout_scale(p);
  return a;
}

Tensor bias_dropout_add_forward(const Tensor& x_any, const OptionalTensor& bias_any, const Tensor& residual_any,
                                const OptionalTensor& rng_state, double p, int64_t inner, int64_t start,
                                int64_t stride0, int64_t stride1) {
  check_kernel_dtype(x_any, "x");
  STD_TORCH_CHECK(residual_any.numel() == x_any.numel() && on_same_device(residual_any, x_any),
                  "residual must have the shape and device of x");
  const DeviceGuard guard(x_any.get_device());
  const Tensor x = made_contiguous(x_any), residual = made_contiguous(residual_any);
  const OptionalTensor bias = checked_parameter(bias_any, x, "bias");
  Tensor y = empty(Sizes(residual), residual.scalar_type(), residual);
  BiasDropoutAdd a = arguments(x, x.scalar_type(), residual.scalar_type(), bias, rng_state, p,
                               {inner, start, stride0, stride1});
  a.x = x.const_data_ptr();
  a.bias = const_parameter(bias);
  a.residual = residual.const_data_ptr();
  a.y = y.mutable_data_ptr();
  launch_bias_dropout_add_forward(a, multiprocessors(), current_stream(x));
  check_launch("bias_dropout_add_forward");
  return y;
}

std::tuple<Tensor, Tensor> bias_dropout_add_backward(const Tensor& dy_any, const OptionalTensor& bias_any,
                                                     const OptionalTensor& rng_state, ScalarType x_dtype, double p,
                                                     int64_t inner, int64_t start, int64_t stride0, int64_t stride1,
                                                     bool need_dx, bool need_dbias) {
  check_kernel_dtype(dy_any, "dy");
  const DeviceGuard guard(dy_any.get_device());
  const Tensor dy = made_contiguous(dy_any);
  const OptionalTensor bias = checked_parameter(bias_any, dy, "bias");
  need_dbias = need_dbias && bias.has_value();
  const int64_t zero = 0;
  Tensor dx = need_dx ? empty(Sizes(dy), x_dtype, dy) : empty({&zero, 1}, x_dtype, dy);
  Tensor dbias = need_dbias ? empty(Sizes(*bias), bias->scalar_type(), dy) : nothing(dy);
  BiasDropoutAdd a =
      arguments(dy, x_dtype, dy.scalar_type(), bias, rng_state, p, {inner, start, stride0, stride1});
  if (a.width == 0 || (!need_dbias && (!need_dx || a.count == 0))) return {dx, dbias};
  a.dy = dy.const_data_ptr();
  a.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  const int64_t partial_sizes[] = {need_dbias ? bias_dropout_add_parts(a, multiprocessors()) * a.width : 0};
  Tensor partials = empty(partial_sizes, ScalarType::Float, dy);
  a.partials = need_dbias ? static_cast<float*>(partials.mutable_data_ptr()) : nullptr;
  a.dbias = mutable_parameter(dbias, need_dbias);
  launch_bias_dropout_add_backward(a, multiprocessors(), current_stream(dy));
  check_launch("bias_dropout_add_backward");
  return {dx, dbias};
}

}  // namespace
}  // namespace fm

FM_CUDA_LIBRARY_IMPL(m) {
  m.impl("bias_dropout_add_forward", TORCH_BOX(&fm::bias_dropout_add_forward));
  m.impl("bias_dropout_add_backward", TORCH_BOX(&fm::bias_dropout_add_backward));
}

#include <tuple>

#include "launch_checks.h"
#include "layer_norm_backward.cuh"
#include "layer_norm_forward.cuh"
#include "layer_norm_shapes.h"

namespace fm {
namespace {

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x_any, const OptionalTensor& weight_any,
                                                      const OptionalTensor& bias_any, double eps) {
  const int64_t width = layer_norm_width(x_any);
  const DeviceGuard guard(x_any.get_device());
  const Tensor x = made_contiguous(x_any);
  const OptionalTensor weight = checked_parameter(weight_any, x, "weight");
  const OptionalTensor bias = checked_parameter(bias_any, x, "bias");
  Tensor y = empty(Sizes(x), x.scalar_type(), x);
  const Sizes row_sizes(x, 1);
  Tensor mean = empty(row_sizes, ScalarType::Float, x), rstd = empty(row_sizes, ScalarType::Float, x);
  launch_layer_norm_forward({device_dtype(x.scalar_type()), x.const_data_ptr(), const_parameter(weight),
                             const_parameter(bias), y.mutable_data_ptr(),
                             static_cast<float*>(mean.mutable_data_ptr()), static_cast<float*>(rstd.mutable_data_ptr()),
                             x.numel() / width, width, static_cast<float>(eps)},
                            current_stream(x));
  check_launch("layer_norm_forward");
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy_any, const Tensor& x_any,
                                                       const OptionalTensor& weight_any, const OptionalTensor& bias_any,
                                                       const Tensor& mean_any, const Tensor& rstd_any, bool need_dx,
                                                       bool need_dweight, bool need_dbias) {
  const DeviceGuard guard(x_any.get_device());
  const LayerNormBackwardInputs in(dy_any, x_any, weight_any, bias_any, mean_any, rstd_any);
  need_dweight = need_dweight && in.weight.has_value();
  need_dbias = need_dbias && in.bias.has_value();
  const bool need_sums = need_dweight || need_dbias;
  Tensor dx = need_dx ? empty(Sizes(in.x), in.x.scalar_type(), in.x) : nothing(in.x);
  Tensor dweight = need_dweight ? empty(Sizes(*in.weight), in.weight->scalar_type(), in.x) : nothing(in.x);
  Tensor dbias = need_dbias ? empty(Sizes(*in.bias), in.bias->scalar_type(), in.x) : nothing(in.x);
  if (!need_sums && (!need_dx || in.rows == 0)) return {dx, dweight, dbias};
  const DType dtype = device_dtype(in.x.scalar_type());
  const int64_t parts = layer_norm_parts(in.rows, in.width, dtype, multiprocessors());
  const int64_t partial_sizes[] = {need_sums ? parts * 2 * in.width : 0};
  Tensor partials = empty(partial_sizes, ScalarType::Float, in.x);
  launch_layer_norm_backward(
      {dtype, in.dy.const_data_ptr(), in.x.const_data_ptr(), const_parameter(in.weight),
       static_cast<const float*>(in.mean.const_data_ptr()), static_cast<const float*>(in.rstd.const_data_ptr()),
       need_dx ? dx.mutable_data_ptr() : nullptr,
       need_sums ? static_cast<float*>(partials.mutable_data_ptr()) : nullptr, in.rows, in.width, parts,
       mutable_parameter(dweight, need_dweight), mutable_parameter(dbias, need_dbias)},
      current_stream(in.x));
  check_launch("layer_norm_backward");
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fm

FM_CUDA_LIBRARY_IMPL(m) {
  m.impl("layer_norm_forward", TORCH_BOX(&fm::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&fm::layer_norm_backward));
}

// layer_norm on the GPU: its registration over the kernels of norm/cuda.cuh.
#include <tuple>

#include "norm/cuda.cuh"

namespace fm {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, const OptionalTensor& weight,
                                                              const OptionalTensor& bias, double eps,
                                                              const OptionalTensor& residual,
                                                              bool zero_centered_weight) {
  const DeviceGuard guard(x.get_device());
  const NormForwardOutputs out =
      norm_forward_cuda<true>(NormForwardInputs(x, weight, bias, residual), eps, zero_centered_weight);
  check_launch("layer_norm_forward");
  return {out.y, out.mean, out.rstd, out.total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
    const Tensor& rstd, bool need_dx, bool need_dweight, bool need_dbias, const OptionalTensor& dtotal,
    bool need_dresidual, bool zero_centered_weight) {
  const DeviceGuard guard(x.get_device());
  const NormBackwardInputs in(dy, x, weight, bias, mean, rstd, dtotal, need_dresidual);
  const NormBackwardOutputs out =
      norm_backward_cuda<true>(in, need_dx, need_dweight, need_dbias, need_dresidual, zero_centered_weight);
  check_launch("layer_norm_backward");
  return {out.dx, out.dweight, out.dbias, out.dresidual};
}

}  // namespace
}  // namespace fm

FM_CUDA_LIBRARY_IMPL(m) {
  m.impl("layer_norm_forward", TORCH_BOX(&fm::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&fm::layer_norm_backward));
}

// rms_norm on the GPU: its registration over the kernels of norm/cuda.cuh.
#include <tuple>

#include "norm/cuda.cuh"

namespace fm {
namespace {

std::tuple<Tensor, Tensor, Tensor> rms_norm_forward(const Tensor& x, const OptionalTensor& weight, double eps,
                                                    const OptionalTensor& residual, bool zero_centered_weight) {
  const DeviceGuard guard(x.get_device());
  const NormForwardOutputs out =
      norm_forward_cuda<false>(NormForwardInputs(x, weight, std::nullopt, residual), eps, zero_centered_weight);
  check_launch("rms_norm_forward");
  return {out.y, out.rstd, out.total};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                     const Tensor& rstd, bool need_dx, bool need_dweight,
                                                     const OptionalTensor& dtotal, bool need_dresidual,
                                                     bool zero_centered_weight) {
  const DeviceGuard guard(x.get_device());
  const NormBackwardInputs in(dy, x, weight, std::nullopt, std::nullopt, rstd, dtotal, need_dresidual);
  const NormBackwardOutputs out =
      norm_backward_cuda<false>(in, need_dx, need_dweight, false, need_dresidual, zero_centered_weight);
  check_launch("rms_norm_backward");
  return {out.dx, out.dweight, out.dresidual};
}

}  // namespace
}  // namespace fm

FM_CUDA_LIBRARY_IMPL(m) {
  m.impl("rms_norm_forward", TORCH_BOX(&fm::rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&fm::rms_norm_backward));
}

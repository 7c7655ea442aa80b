// layer_norm on the CPU: its registration over the kernels of norm/cpu.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "norm/cpu.h"

namespace fm {

FM_NORM_CPU_KERNELS(true)

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, const OptionalTensor& weight,
                                                              const OptionalTensor& bias, double eps,
                                                              const OptionalTensor& residual,
                                                              bool zero_centered_weight) {
  const NormForwardOutputs out =
      norm_forward_cpu<true>(NormForwardInputs(x, weight, bias, residual), eps, zero_centered_weight);
  return {out.y, out.mean, out.rstd, out.total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
    const Tensor& rstd, bool need_dx, bool need_dweight, bool need_dbias, const OptionalTensor& dtotal,
    bool need_dresidual, bool zero_centered_weight) {
  const NormBackwardInputs in(dy, x, weight, bias, mean, rstd, dtotal, need_dresidual);
  const NormBackwardOutputs out =
      norm_backward_cpu<true>(in, need_dx, need_dweight, need_dbias, need_dresidual, zero_centered_weight);
  return {out.dx, out.dweight, out.dbias, out.dresidual};
}

}  // namespace
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&fm::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&fm::layer_norm_backward));
}

// rms_norm on the CPU: its registration over the kernels of norm/cpu.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "norm/cpu.h"

namespace fm {

FM_NORM_CPU_KERNELS(false)

namespace {

std::tuple<Tensor, Tensor, Tensor> rms_norm_forward(const Tensor& x, const OptionalTensor& weight, double eps,
                                                    const OptionalTensor& residual, bool zero_centered_weight) {
  const NormForwardOutputs out =
      norm_forward_cpu<false>(NormForwardInputs(x, weight, std::nullopt, residual), eps, zero_centered_weight);
  return {out.y, out.rstd, out.total};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                     const Tensor& rstd, bool need_dx, bool need_dweight,
                                                     const OptionalTensor& dtotal, bool need_dresidual,
                                                     bool zero_centered_weight) {
  const NormBackwardInputs in(dy, x, weight, std::nullopt, std::nullopt, rstd, dtotal, need_dresidual);
  const NormBackwardOutputs out =
      norm_backward_cpu<false>(in, need_dx, need_dweight, false, need_dresidual, zero_centered_weight);
  return {out.dx, out.dweight, out.dresidual};
}

}  // namespace
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&fm::rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&fm::rms_norm_backward));
}

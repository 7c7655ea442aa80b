// bias_swiglu on the CPU: its registration over the kernels of activation/cpu.h.
#include "activation/cpu.h"

namespace fm {
namespace {

FM_ACTIVATION_KERNELS(Silu, true)

Tensor bias_swiglu_forward(const Tensor& x, const OptionalTensor& bias) {
  return activation_forward<SiluKernels>(x, bias);
}

std::tuple<Tensor, Tensor> bias_swiglu_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& bias,
                                                bool need_dx, bool need_dbias) {
  return activation_backward<SiluKernels>(dy, x, bias, need_dx, need_dbias);
}

}  // namespace
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) {
  m.impl("bias_swiglu_forward", TORCH_BOX(&fm::bias_swiglu_forward));
  m.impl("bias_swiglu_backward", TORCH_BOX(&fm::bias_swiglu_backward));
}

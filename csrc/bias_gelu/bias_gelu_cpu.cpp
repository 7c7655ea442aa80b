// bias_gelu on the CPU: its registration over the kernels of activation/cpu.h.
#include "activation/cpu.h"

namespace fm {
namespace {

FM_ACTIVATION_KERNELS(GeluTanh, false)
FM_ACTIVATION_KERNELS(GeluErf, false)

Tensor bias_gelu_forward(const Tensor& x, const OptionalTensor& bias, bool tanh) {
  return tanh ? activation_forward<GeluTanhKernels>(x, bias) : activation_forward<GeluErfKernels>(x, bias);
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& bias, bool tanh,
                                              bool need_dx, bool need_dbias) {
  return tanh ? activation_backward<GeluTanhKernels>(dy, x, bias, need_dx, need_dbias)
              : activation_backward<GeluErfKernels>(dy, x, bias, need_dx, need_dbias);
}

}  // namespace
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) {
  m.impl("bias_gelu_forward", TORCH_BOX(&fm::bias_gelu_forward));
  m.impl("bias_gelu_backward", TORCH_BOX(&fm::bias_gelu_backward));
}

// bias_gelu on the GPU: its registration over the kernels of activation/kernels.cuh.
#include "activation/cuda.cuh"

namespace fm {
namespace {

Tensor bias_gelu_forward(const Tensor& x, const OptionalTensor& bias, bool tanh) {
  return tanh ? activation_forward<GeluTanh, false>(x, bias) : activation_forward<GeluErf, false>(x, bias);
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& bias, bool tanh,
                                              bool need_dx, bool need_dbias) {
  return tanh ? activation_backward<GeluTanh, false>(dy, x, bias, need_dx, need_dbias)
              : activation_backward<GeluErf, false>(dy, x, bias, need_dx, need_dbias);
}

}  // namespace
}  // namespace fm

FM_CUDA_LIBRARY_IMPL(m) {
  m.impl("bias_gelu_forward", TORCH_BOX(&fm::bias_gelu_forward));
  m.impl("bias_gelu_backward", TORCH_BOX(&fm::bias_gelu_backward));
}

// bias_swiglu on the GPU: its registration over the kernels of activation/kernels.cuh.
#include "activation/cuda.cuh"

namespace fm {
namespace {

Tensor bias_swiglu_forward(const Tensor& x, const OptionalTensor& bias) {
  return activation_forward<Silu, true>(x, bias);
}

std::tuple<Tensor, Tensor> bias_swiglu_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& bias,
                                                bool need_dx, bool need_dbias) {
  return activation_backward<Silu, true>(dy, x, bias, need_dx, need_dbias);
}

}  // namespace
}  // namespace fm

FM_CUDA_LIBRARY_IMPL(m) {
  m.impl("bias_swiglu_forward", TORCH_BOX(&fm::bias_swiglu_forward));
  m.impl("bias_swiglu_backward", TORCH_BOX(&fm::bias_swiglu_backward));
}

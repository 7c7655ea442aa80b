// The CUDA bias_gelu for the host: compiled by tests/csrc/test_bias_gelu_emulation.py.
#include "bias_gelu/bias_gelu_kernels.cuh"

extern "C" {
void forward(const fm::BiasGelu* a) { fm::launch_bias_gelu_forward(*a, nullptr); }
void backward(const fm::BiasGelu* a) { fm::launch_bias_gelu_backward(*a, nullptr); }
int64_t parts(const fm::BiasGelu* a, int multiprocessors) { return fm::bias_gelu_parts(*a, multiprocessors); }
}

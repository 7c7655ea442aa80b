// Kernels with the faults that the emulation must find: compiled by test_cuda_emulation.py.
#include <exception>
#include <string>

#include "cuda/launch.h"

namespace fm {

inline float warp_sum(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
  return value;
}

__global__ void sum(float* out) {
  const float total = warp_sum(static_cast<float>(threadIdx.x + blockIdx.x));
  const float lanes = warp_sum(1.0f);
  if (threadIdx.x % 32 == 5) out[blockIdx.x * 2 + threadIdx.x / 32] = total * 100.0f + lanes;
}

__global__ void shuffles(int64_t* out) {
  const int64_t value = int64_t{threadIdx.x} << 40;
  out[threadIdx.x] = __shfl_sync(~0u, value, 3);
  out[32 + threadIdx.x] = __shfl_down_sync(~0u, value, 8);
  out[64 + threadIdx.x] = __shfl_xor_sync(~0u, value, 1, 2);
  out[96 + threadIdx.x] = __ballot_sync(~0u, threadIdx.x > 29);
}

__global__ void reverse(float* out, bool with_barrier) {
  FM_SHARED(float, values, 64);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void reverse_dynamic(float* out) {
  FM_DYNAMIC_SHARED(float, values);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void diverge(bool barrier) {
  if (threadIdx.x == 7) return;
  if (barrier) {
    __syncthreads();
  } else {
    warp_sum(1.0f);
  }
}

__global__ void at_different_shuffles(float* out) {
  float value = 1.0f;
  for (unsigned i = 0; i < 1 + threadIdx.x / 16; ++i) value += __shfl_xor_sync(~0u, value, 1);
  out[threadIdx.x] = value;
}

__global__ void copy(const float* in, float* out, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) out[i] = in[i];
}

__global__ void copy_wide(const float* in, float* out) {
  reinterpret_cast<float4*>(out)[threadIdx.x] = reinterpret_cast<const float4*>(in)[threadIdx.x];
}

__global__ void number_blocks(float* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<float>(blockIdx.x);
}

// What a launch throws; empty if nothing.
template <typename Launch>
const char* error_of(const Launch& launch) {
  static std::string message;
  message.clear();
  try {
    launch();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace fm

using namespace fm;
#define RUN(...) return error_of([&] { FM_LAUNCH_DYNAMIC(__VA_ARGS__); })

extern "C" {
const char* run_sum(float* out) { RUN(sum, dim3(3), dim3(64), 0, nullptr, out); }
const char* run_shuffles(int64_t* out) { RUN(shuffles, dim3(1), dim3(32), 0, nullptr, out); }
const char* run_reverse(float* out, bool barrier) { RUN(reverse, dim3(1), dim3(64), 0, nullptr, out, barrier); }
const char* run_reverse_dynamic(float* out, int bytes) { RUN(reverse_dynamic, dim3(1), dim3(64), bytes, nullptr, out); }
void allow(int bytes) { cudaFuncSetAttribute(&reverse_dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); }
const char* run_diverge(bool barrier) { RUN(diverge, dim3(1), dim3(32), 0, nullptr, barrier); }
const char* run_at_different_shuffles(float* out) { RUN(at_different_shuffles, dim3(1), dim3(32), 0, nullptr, out); }
const char* run_copy(const float* in, float* out, int count) { RUN(copy, dim3(2), dim3(32), 0, nullptr, in, out, count); }
const char* run_copy_wide(const float* in, float* out) { RUN(copy_wide, dim3(1), dim3(32), 0, nullptr, in, out); }
const char* run_many(float* out) { RUN(number_blocks, dim3(300), dim3(32), 0, nullptr, out); }
const char* run_block(unsigned x) { RUN(diverge, dim3(1), dim3(x), 0, nullptr, true); }
}

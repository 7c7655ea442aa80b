// Kernels with the faults that the emulation must find: compiled by tests/testing/test_cuda_emulation.py.
#include "row_reduction.cuh"

__global__ void reverse(float* out, bool with_barrier) {
  FM_SHARED(float, values, 64);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void diverge(bool barrier) {
  if (threadIdx.x < 7) return;
  if (barrier) {
    __syncthreads();
  } else {
    fm::warp_sum({1.0f, 1.0f});
  }
}

__global__ void sum(float* out) {
  const float2 total = fm::warp_sum({static_cast<float>(threadIdx.x + blockIdx.x), 1.0f});
  if (threadIdx.x % 32 == 5) out[blockIdx.x * 2 + threadIdx.x / 32] = total.x * 100.0f + total.y;
}

extern "C" {
void run_reverse(float* out, bool with_barrier) { FM_LAUNCH(reverse, dim3(1), dim3(64), nullptr, out, with_barrier); }
void run_diverge(bool barrier) { FM_LAUNCH(diverge, dim3(1), dim3(32), nullptr, barrier); }
void run_sum(float* out) { FM_LAUNCH(sum, dim3(3), dim3(64), nullptr, out); }
}

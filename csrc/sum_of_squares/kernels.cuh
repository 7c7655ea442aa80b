// The CUDA kernels of a sum of squares over many tensors: plain pointers, no torch.
#pragma once

#include <cstdint>

#include "cuda/row_reduction.cuh"
#include "cuda/tensor_blocks.cuh"
#include "cuda/vector_access.cuh"

namespace fm {

inline constexpr int kSquaresWarps = 8, kSquaresThreads = kSquaresWarps * kWarpSize;
// Elements of one block: every thread has eight runs of four. Of the bytes that a block reads, its sum takes 0.02 %.
inline constexpr int64_t kSquaresChunk = 8192;
// Tensors of one launch; the arguments of a kernel have 4 KiB.
inline constexpr int kSquaresTensors = 192;
inline constexpr int kFinishWarps = 32;

struct SquaresTensors {
  TensorBlocks<kSquaresTensors, kSquaresChunk> blocks;
  const float* data[kSquaresTensors];
};

FM_DEVICE double with_square(double sum, float x) {
  const double wide = static_cast<double>(x);  // its square is exact: with or without a fused multiply-add
  return sum + wide * wide;
}

// Each block writes the sum of its chunk to sums[block]. An element belongs to the same thread at every alignment.
template <int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize) sum_of_squares_kernel(SquaresTensors tensors, double* sums) {
  constexpr int kThreads = kWarps * kWarpSize;
  FM_SHARED(double, scratch, kWarps);
  const int index = tensors.blocks.tensor();
  const float* data = tensors.data[index] + tensors.blocks.begin(index);
  const int count = tensors.blocks.elements(index), thread = static_cast<int>(threadIdx.x);
  const int runs = reinterpret_cast<uintptr_t>(data) % 16 == 0 ? count / 4 : 0;  // that are read in one access
  using A = Access<float, true>;
  double sum = 0.0;
  int run = thread;
#pragma unroll 4
  for (; run < runs; run += kThreads) {
    float x[4];
    A::unpack(A::load(data + 4 * run), x);
#pragma unroll
    for (int k = 0; k < 4; ++k) sum = with_square(sum, x[k]);
  }
  // The rest of the chunk; all of it where the address is no multiple of 16 bytes.
  for (; 4 * run < count; run += kThreads) {
    for (int i = 4 * run; i < count && i < 4 * run + 4; ++i) sum = with_square(sum, data[i]);
  }
  sum = row_sum<kWarps>(sum, scratch, thread / kWarpSize, thread % kWarpSize);
  if (thread == 0) sums[blockIdx.x] = sum;
}

// One block adds the sums of all blocks.
template <int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    finish_sum_of_squares(const double* sums, int64_t count, double* total) {
  FM_SHARED(double, scratch, kWarps);
  const int thread = static_cast<int>(threadIdx.x);
  double sum = 0.0;
  FM_WAIT_FOR_KERNEL_BEFORE();
  for (int64_t i = thread; i < count; i += kWarps * kWarpSize) sum += sums[i];
  sum = row_sum<kWarps>(sum, scratch, thread / kWarpSize, thread % kWarpSize);
  if (thread == 0) *total = sum;
}

}  // namespace fm

// The second half of a sum over rows: the partial sums of all blocks, added in a fixed order.
//
// Every block of the first kernel leaves one row of float32 partial sums; this kernel adds them without atomics, and
// rounds once.
#pragma once

#include <cstdint>

#include "cuda/numbers.cuh"

namespace fm {

struct ColumnSums {
  const float* partials;    // part p of output k is at partials + p * stride + k * width
  int64_t parts, stride, width;
  MutableParameter outputs[2];  // null: not wanted
};

inline constexpr int kFinishColumns = 32;
inline constexpr int kFinishSlices = 8;

// A template, so that two translation units may contain it.
template <int kSlices>
__global__ void __launch_bounds__(kFinishColumns* kSlices) finish_column_sums(ColumnSums a) {
  FM_SHARED(float, sums, kSlices * kFinishColumns);
  const MutableParameter output = blockIdx.y == 0 ? a.outputs[0] : a.outputs[1];
  const int lane = threadIdx.x % kFinishColumns, slice = threadIdx.x / kFinishColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kFinishColumns + lane;
  FM_WAIT_FOR_KERNEL_BEFORE();
  if (output.data == nullptr) return;
  float sum = 0.0f;
  if (column < a.width) {
    const float* partials = a.partials + blockIdx.y * a.width + column;
    for (int64_t part = slice; part < a.parts; part += kSlices) sum += partials[part * a.stride];
  }
  sums[slice * kFinishColumns + lane] = sum;
  __syncthreads();
  if (slice > 0 || column >= a.width) return;
#pragma unroll
  for (int i = 1; i < kSlices; ++i) sum += sums[i * kFinishColumns + lane];
  if (output.dtype == DType::kFloat32) {
    static_cast<float*>(output.data)[column] = sum;
  } else if (output.dtype == DType::kBFloat16) {
    static_cast<BFloat16*>(output.data)[column] = from_float<BFloat16>(sum);
  } else {
    static_cast<Float16*>(output.data)[column] = from_float<Float16>(sum);
  }
}

inline void launch_finish_column_sums(const ColumnSums& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((a.width + kFinishColumns - 1) / kFinishColumns), 2);
  auto* kernel = finish_column_sums<kFinishSlices>;
  FM_LAUNCH_AFTER(kernel, grid, dim3(kFinishColumns * kFinishSlices), stream, a);
}

}  // namespace fm

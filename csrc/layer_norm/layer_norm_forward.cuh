#pragma once

#include "layer_norm_kernels.cuh"
#include "row_reduction.cuh"
#include "vector_access.cuh"

namespace fm {

// One read of x: the row stays in registers, kAccesses times 16 bytes a thread (as read: a 16-bit row takes half the
// registers that its float32 values would), for the mean, then for the squares of the centred values, then for the
// result. kWarps warps share a row; one-warp rows come four to a block.
template <typename T, int kWarps, int kAccesses>
__global__ void __launch_bounds__(kWarps == 1 ? 4 * kWarpSize : kWarps* kWarpSize)
    layer_norm_forward_in_registers(LayerNormForward a) {
  using A = Access<T, true>;
  constexpr int kRowsPerBlock = kWarps == 1 ? 4 : 1;
  constexpr int kThreadsPerRow = kWarps * kWarpSize;
  FM_SHARED(float2, scratch, 2 * kWarps);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize % kWarps;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreadsPerRow;
  if (row >= a.rows) return;  // whole warps, and only where kWarps is 1: no barrier follows
  const T* x = static_cast<const T*>(a.x) + row * a.width;
  T* y = static_cast<T*>(a.y) + row * a.width;
  const int first = threadIdx.x % kThreadsPerRow * A::kCount;
  constexpr int kStep = kThreadsPerRow * A::kCount;
  const int width = static_cast<int>(a.width);

  typename A::Raw raw[kAccesses];
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) {
    if (first + i * kStep < width) raw[i] = A::load(x + first + i * kStep);
  }
  float values[A::kCount];
  float2 sum{0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) {
    if (first + i * kStep >= width) continue;
    A::unpack(raw[i], values);
#pragma unroll
    for (int k = 0; k < A::kCount; ++k) sum.x += values[k];
  }
  const float mean = row_sum<kWarps>(sum, scratch, warp, lane).x / static_cast<float>(width);
  float2 squares{0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) {
    if (first + i * kStep >= width) continue;
    A::unpack(raw[i], values);
#pragma unroll
    for (int k = 0; k < A::kCount; ++k) squares.x += (values[k] - mean) * (values[k] - mean);
  }
  const float variance = row_sum<kWarps>(squares, scratch + kWarps, warp, lane).x / static_cast<float>(width);
  const float rstd = inverse_sqrt(variance + a.eps);
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) {
    const int column = first + i * kStep;
    if (column >= width) continue;
    float weight[A::kCount], bias[A::kCount];
    A::unpack(raw[i], values);
    load_parameter(a.weight, column, 1.0f, weight);
    load_parameter(a.bias, column, 0.0f, bias);
#pragma unroll
    for (int k = 0; k < A::kCount; ++k) values[k] = (values[k] - mean) * rstd * weight[k] + bias[k];
    A::store(y + column, values);
  }
  if (threadIdx.x % kThreadsPerRow == 0) {
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
}

// Any width and any address: the second and third reading of the row come from the caches.
template <typename T, bool kWide>
__global__ void __launch_bounds__(256) layer_norm_forward_looped(LayerNormForward a) {
  using A = Access<T, kWide>;
  constexpr int kWarps = 8;
  constexpr int64_t kStep = static_cast<int64_t>(kWarps) * kWarpSize * A::kCount;
  FM_SHARED(float2, scratch, 2 * kWarps);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + row * a.width;
  T* y = static_cast<T*>(a.y) + row * a.width;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * A::kCount;

  float values[A::kCount];
  float2 sum{0.0f, 0.0f};
  for (int64_t column = first; column < a.width; column += kStep) {
    A::unpack(A::load(x + column), values);
#pragma unroll
    for (int k = 0; k < A::kCount; ++k) sum.x += values[k];
  }
  const float mean = row_sum<kWarps>(sum, scratch, warp, lane).x / static_cast<float>(a.width);
  float2 squares{0.0f, 0.0f};
  for (int64_t column = first; column < a.width; column += kStep) {
    A::unpack(A::load(x + column), values);
#pragma unroll
    for (int k = 0; k < A::kCount; ++k) squares.x += (values[k] - mean) * (values[k] - mean);
  }
  const float variance = row_sum<kWarps>(squares, scratch + kWarps, warp, lane).x / static_cast<float>(a.width);
  const float rstd = inverse_sqrt(variance + a.eps);
  for (int64_t column = first; column < a.width; column += kStep) {
    float weight[A::kCount], bias[A::kCount];
    A::unpack(A::load(x + column), values);
    load_parameter(a.weight, column, 1.0f, weight);
    load_parameter(a.bias, column, 0.0f, bias);
#pragma unroll
    for (int k = 0; k < A::kCount; ++k) values[k] = (values[k] - mean) * rstd * weight[k] + bias[k];
    A::store(y + column, values);
  }
  if (threadIdx.x == 0) {
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
}

template <typename T, int kWarps>
void launch_forward_in_registers(const LayerNormForward& a, cudaStream_t stream) {
  constexpr int kRowsPerBlock = kWarps == 1 ? 4 : 1;
  const dim3 grid(static_cast<unsigned>((a.rows + kRowsPerBlock - 1) / kRowsPerBlock));
  auto* kernel = layer_norm_forward_in_registers<T, kWarps, 4>;
  FM_LAUNCH(kernel, grid, dim3(kRowsPerBlock * kWarps * kWarpSize), stream, a);
}

inline void launch_layer_norm_forward(const LayerNormForward& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  for_device_dtype(a.dtype, [&]<typename T>(T) {
    constexpr int64_t kCount = Access<T, true>::kCount;
    const bool wide = a.width % kCount == 0 && is_aligned(a.x) && is_aligned(a.y) && is_aligned(a.weight.data) &&
                      is_aligned(a.bias.data);
    // The widths that 1, 8 and 32 warps hold in four accesses a thread.
    constexpr int64_t kWarpWidth = 4 * kWarpSize * kCount;
    if (wide && a.width <= kWarpWidth) {
      launch_forward_in_registers<T, 1>(a, stream);
    } else if (wide && a.width <= 8 * kWarpWidth) {
      launch_forward_in_registers<T, 8>(a, stream);
    } else if (wide && a.width <= 32 * kWarpWidth) {
      launch_forward_in_registers<T, 32>(a, stream);
    } else {
      const dim3 grid(static_cast<unsigned>(a.rows)), block(256);
      auto* kernel = wide ? layer_norm_forward_looped<T, true> : layer_norm_forward_looped<T, false>;
      FM_LAUNCH(kernel, grid, block, stream, a);
    }
  });
}

}  // namespace fm

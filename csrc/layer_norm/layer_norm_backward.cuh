#pragma once

#include <algorithm>

#include "column_sums.cuh"
#include "layer_norm_kernels.cuh"
#include "row_reduction.cuh"
#include "vector_access.cuh"

namespace fm {

inline constexpr int kBackwardAccesses = 2;

// Persistent blocks, each with a contiguous range of rows: dy and x are read once, the next rows while the present ones
// are reduced, and every thread gathers dweight and dbias of its own columns in registers. kWarps warps share a row,
// kGroups rows are in work at a time.
template <typename T, int kWarps, int kGroups>
__global__ void __launch_bounds__(kWarps* kGroups* kWarpSize) layer_norm_backward_in_registers(LayerNormBackward a) {
  using A = Access<T, true>;
  constexpr int kAccesses = kBackwardAccesses;
  constexpr int kThreadsPerRow = kWarps * kWarpSize;
  constexpr int kColumns = kThreadsPerRow * A::kCount * kAccesses;
  constexpr int kStep = kThreadsPerRow * A::kCount;
  FM_SHARED(float2, scratch, 2 * kGroups * kWarps);
  FM_SHARED(float, group_sums, kGroups > 1 ? kGroups * kColumns : 1);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize % kWarps;
  const int group = threadIdx.x / kThreadsPerRow;
  const int first = threadIdx.x % kThreadsPerRow * A::kCount;
  const int width = static_cast<int>(a.width);
  const int64_t begin = a.rows * blockIdx.x / gridDim.x, end = a.rows * (blockIdx.x + 1) / gridDim.x;
  const T* dy = static_cast<const T*>(a.dy);
  const T* x = static_cast<const T*>(a.x);

  float dweight[kAccesses][A::kCount] = {}, dbias[kAccesses][A::kCount] = {};
  typename A::Raw next_dy[kAccesses], next_x[kAccesses];
  float next_mean = 0.0f, next_rstd = 0.0f;
  const auto prefetch = [&](int64_t row) {
    if (row >= end) return;
    next_mean = a.mean[row];
    next_rstd = a.rstd[row];
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (first + i * kStep >= width) continue;
      next_dy[i] = A::load(dy + row * a.width + first + i * kStep);
      next_x[i] = A::load(x + row * a.width + first + i * kStep);
    }
  };
  prefetch(begin + group);
  int parity = 0;
  // Every group makes the same number of rounds, since they share the barrier in row_sum.
  for (int64_t base = begin; base < end; base += kGroups, parity ^= 1) {
    const int64_t row = base + group;
    const bool active = row < end;
    const float mean = next_mean, rstd = next_rstd;
    typename A::Raw row_dy[kAccesses], row_x[kAccesses];
    float g[A::kCount], normalised[A::kCount], weight[A::kCount];
    float2 sums{0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (!active || first + i * kStep >= width) continue;
      row_dy[i] = next_dy[i];
      row_x[i] = next_x[i];
      A::unpack(row_dy[i], g);
      A::unpack(row_x[i], normalised);
      load_parameter(a.weight, first + i * kStep, 1.0f, weight);
#pragma unroll
      for (int k = 0; k < A::kCount; ++k) {
        normalised[k] = (normalised[k] - mean) * rstd;
        dweight[i][k] += g[k] * normalised[k];
        dbias[i][k] += g[k];
        g[k] *= weight[k];
        sums.x += g[k];
        sums.y += g[k] * normalised[k];
      }
    }
    prefetch(row + kGroups);
    sums = row_sum<kWarps>(sums, scratch + (parity * kGroups + group) * kWarps, warp, lane);
    if (!active || a.dx == nullptr) continue;
    const float mean_g = sums.x / static_cast<float>(width), mean_projection = sums.y / static_cast<float>(width);
    // Unpacked again: kept as float32 over the reduction, the row would not fit in the registers.
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (first + i * kStep >= width) continue;
      A::unpack(row_dy[i], g);
      A::unpack(row_x[i], normalised);
      load_parameter(a.weight, first + i * kStep, 1.0f, weight);
#pragma unroll
      for (int k = 0; k < A::kCount; ++k) {
        g[k] = rstd * (g[k] * weight[k] - mean_g - (normalised[k] - mean) * rstd * mean_projection);
      }
      A::store(static_cast<T*>(a.dx) + row * a.width + first + i * kStep, g);
    }
  }
  if (a.partials == nullptr) return;
  float* partials = a.partials + static_cast<int64_t>(blockIdx.x) * 2 * a.width;
#pragma unroll
  for (int output = 0; output < 2; ++output) {
    if constexpr (kGroups > 1) __syncthreads();
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
#pragma unroll
      for (int k = 0; k < A::kCount; ++k) {
        const int column = first + i * kStep + k;
        const float sum = output == 0 ? dweight[i][k] : dbias[i][k];
        if constexpr (kGroups > 1) {
          group_sums[group * kColumns + column] = sum;
        } else if (column < width) {
          partials[output * a.width + column] = sum;
        }
      }
    }
    if constexpr (kGroups > 1) {
      __syncthreads();
      for (int column = threadIdx.x; column < width; column += kGroups * kThreadsPerRow) {
        float sum = group_sums[column];
#pragma unroll
        for (int other = 1; other < kGroups; ++other) sum += group_sums[other * kColumns + column];
        partials[output * a.width + column] = sum;
      }
    }
  }
}

// dx for any width and any address; the row's second reading comes from the caches.
template <typename T, bool kWide>
__global__ void __launch_bounds__(256) layer_norm_dx_looped(LayerNormBackward a) {
  using A = Access<T, kWide>;
  constexpr int kWarps = 8;
  constexpr int64_t kStep = static_cast<int64_t>(kWarps) * kWarpSize * A::kCount;
  FM_SHARED(float2, scratch, kWarps);
  const int64_t row = blockIdx.x;
  const T* dy = static_cast<const T*>(a.dy) + row * a.width;
  const T* x = static_cast<const T*>(a.x) + row * a.width;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * A::kCount;
  const float mean = a.mean[row], rstd = a.rstd[row];
  float g[A::kCount], normalised[A::kCount], weight[A::kCount];
  float2 sums{0.0f, 0.0f};
  for (int64_t column = first; column < a.width; column += kStep) {
    A::unpack(A::load(dy + column), g);
    A::unpack(A::load(x + column), normalised);
    load_parameter(a.weight, column, 1.0f, weight);
#pragma unroll
    for (int k = 0; k < A::kCount; ++k) {
      sums.x += g[k] * weight[k];
      sums.y += g[k] * weight[k] * ((normalised[k] - mean) * rstd);
    }
  }
  sums = row_sum<kWarps>(sums, scratch, threadIdx.x / kWarpSize, threadIdx.x % kWarpSize);
  const float mean_g = sums.x / static_cast<float>(a.width), mean_projection = sums.y / static_cast<float>(a.width);
  for (int64_t column = first; column < a.width; column += kStep) {
    A::unpack(A::load(dy + column), g);
    A::unpack(A::load(x + column), normalised);
    load_parameter(a.weight, column, 1.0f, weight);
#pragma unroll
    for (int k = 0; k < A::kCount; ++k) {
      g[k] = rstd * (g[k] * weight[k] - mean_g - (normalised[k] - mean) * rstd * mean_projection);
    }
    A::store(static_cast<T*>(a.dx) + row * a.width + column, g);
  }
}

// dweight and dbias beside layer_norm_dx_looped: a thread a column, a range of rows a blockIdx.y.
template <typename T>
__global__ void __launch_bounds__(256) layer_norm_column_partials(LayerNormBackward a) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (column >= a.width) return;
  const int64_t begin = a.rows * blockIdx.y / gridDim.y, end = a.rows * (blockIdx.y + 1) / gridDim.y;
  float dweight = 0.0f, dbias = 0.0f;
#pragma unroll 4
  for (int64_t row = begin; row < end; ++row) {
    const float g = to_float(static_cast<const T*>(a.dy)[row * a.width + column]);
    const float value = to_float(static_cast<const T*>(a.x)[row * a.width + column]);
    dweight += g * ((value - a.mean[row]) * a.rstd[row]);
    dbias += g;
  }
  float* partials = a.partials + static_cast<int64_t>(blockIdx.y) * 2 * a.width + column;
  partials[0] = dweight;
  partials[a.width] = dbias;
}

// One block a multiprocessor always, however few the rows: idle processors cost more than partial sums. More blocks
// only while the partial sums (16 bytes a column, written and read) stay below 2% of the traffic (at least 6 bytes an
// element).
inline int64_t layer_norm_parts(int64_t rows, int64_t width, DType dtype, int multiprocessors) {
  const int64_t bytes = dtype == DType::kFloat32 ? 12 : 6;
  const int64_t most = width * bytes <= 12288 ? 4 * multiprocessors : 2 * multiprocessors;
  const int64_t affordable = std::max<int64_t>(multiprocessors, rows * bytes / 800);
  return std::clamp<int64_t>(std::min({affordable, most, (rows + 7) / 8}), 1, 65535);
}

template <typename T, int kWarps, int kGroups>
void launch_backward_in_registers(const LayerNormBackward& a, cudaStream_t stream) {
  auto* kernel = layer_norm_backward_in_registers<T, kWarps, kGroups>;
  FM_LAUNCH(kernel, dim3(static_cast<unsigned>(a.parts)), dim3(kWarps * kGroups * kWarpSize), stream, a);
}

template <typename T>
void launch_backward_looped(const LayerNormBackward& a, bool wide, cudaStream_t stream) {
  const dim3 block(256);
  if (a.dx != nullptr && a.rows > 0) {
    auto* kernel = wide ? layer_norm_dx_looped<T, true> : layer_norm_dx_looped<T, false>;
    FM_LAUNCH(kernel, dim3(static_cast<unsigned>(a.rows)), block, stream, a);
  }
  if (a.partials != nullptr) {
    const dim3 grid(static_cast<unsigned>((a.width + 255) / 256), static_cast<unsigned>(a.parts));
    auto* kernel = layer_norm_column_partials<T>;
    FM_LAUNCH(kernel, grid, block, stream, a);
  }
}

inline void launch_layer_norm_backward(const LayerNormBackward& a, cudaStream_t stream) {
  for_device_dtype(a.dtype, [&]<typename T>(T) {
    constexpr int64_t kCount = Access<T, true>::kCount;
    constexpr int64_t kWarpWidth = kBackwardAccesses * kWarpSize * kCount;
    const bool wide = a.width % kCount == 0 && is_aligned(a.x) && is_aligned(a.dy) && is_aligned(a.dx) &&
                      is_aligned(a.weight.data);
    if (wide && a.width <= kWarpWidth) {
      launch_backward_in_registers<T, 1, 8>(a, stream);
    } else if (wide && a.width <= 4 * kWarpWidth) {
      launch_backward_in_registers<T, 4, 2>(a, stream);
    } else if (wide && a.width <= 16 * kWarpWidth) {
      launch_backward_in_registers<T, 16, 1>(a, stream);
    } else {
      launch_backward_looped<T>(a, wide, stream);
    }
  });
  if (a.partials == nullptr) return;
  launch_finish_column_sums({a.partials, a.parts, 2 * a.width, a.width, {a.dweight, a.dbias}}, stream);
}

}  // namespace fm

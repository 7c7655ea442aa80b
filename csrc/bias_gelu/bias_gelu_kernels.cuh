#pragma once

#include <algorithm>
#include <cstdint>

#include "column_sums.cuh"
#include "vector_access.cuh"

#define FM_GELU FM_DEVICE
namespace fm {
FM_DEVICE float gelu_exp(float x) { return fast_exp(x); }
FM_DEVICE float gelu_reciprocal(float x) { return fast_reciprocal(x); }
FM_DEVICE float gelu_normal_cdf(float u, float) { return 0.5f * erfcf(u * -0.7071067811865476f); }
}  // namespace fm
#include "gelu.h"

namespace fm {

// What the kernels take: plain pointers, no torch. x, y, dy and dx hold `count` elements as rows of `width`; without a
// bias the width is ours to choose, and the last row may be short.
struct BiasGelu {
  DType dtype;
  int32_t tanh;
  const void* x;
  ConstParameter bias;
  int64_t count, width;
  void* y;          // forward
  const void* dy;   // backward, from here on
  void* dx;         // null: not wanted
  float* partials;  // [parts, width]; null: not wanted
  int64_t parts;
  MutableParameter dbias;
};

inline constexpr int kGeluThreads = 256;
inline constexpr int64_t kWidthWithoutBias = 4096;

// A thread keeps its columns and walks down the rows, so that its bias is loaded once. A block is threads_x columns of
// accesses by kGeluThreads / threads_x rows.
struct BiasGeluTiles {
  int64_t rows, accesses;
  int threads_x, threads_y;
  unsigned blocks_x;
  BiasGeluTiles(int64_t count, int64_t width, int64_t elements_per_access)
      : rows((count + width - 1) / width), accesses((width + elements_per_access - 1) / elements_per_access) {
    threads_x = 32;
    while (threads_x < kGeluThreads && threads_x < accesses) threads_x *= 2;
    threads_y = kGeluThreads / threads_x;
    blocks_x = static_cast<unsigned>((accesses + threads_x - 1) / threads_x);
  }
};

// Rows that a thread has in flight at a time: enough loads under way to cover the latency of memory.
inline constexpr int kForwardRows = 4;
inline constexpr int kBackwardRows = 2;

template <typename T, bool kWide, bool kTanh>
__global__ void __launch_bounds__(kGeluThreads) bias_gelu_forward_kernel(BiasGelu a) {
  using A = Access<T, kWide>;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * A::kCount;
  if (column >= a.width) return;
  float bias[A::kCount];
  load_parameter(a.bias, column, 0.0f, bias);
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y * a.width;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  int64_t index = (static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y) * a.width + column;
  for (; index < a.count; index += kForwardRows * step) {
    typename A::Raw raw[kForwardRows];
#pragma unroll
    for (int i = 0; i < kForwardRows; ++i) {
      if (index + i * step < a.count) raw[i] = A::load(x + index + i * step);
    }
#pragma unroll
    for (int i = 0; i < kForwardRows; ++i) {
      if (index + i * step >= a.count) continue;
      float values[A::kCount];
      A::unpack(raw[i], values);
#pragma unroll
      for (int k = 0; k < A::kCount; ++k) values[k] = gelu<kTanh>(values[k] + bias[k]);
      A::store(y + index + i * step, values);
    }
  }
}

template <typename T, bool kWide, bool kTanh>
__global__ void __launch_bounds__(kGeluThreads) bias_gelu_backward_kernel(BiasGelu a) {
  using A = Access<T, kWide>;
  FM_SHARED(float, row_sums, kGeluThreads* A::kCount);
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * A::kCount;
  const bool active = column < a.width;
  float bias[A::kCount], sums[A::kCount] = {};
  if (active) load_parameter(a.bias, column, 0.0f, bias);
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y * a.width;
  const T* x = static_cast<const T*>(a.x);
  const T* dy = static_cast<const T*>(a.dy);
  T* dx = static_cast<T*>(a.dx);
  int64_t index = (static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y) * a.width + column;
  if (!active) index = a.count;  // to the barrier below
  for (; index < a.count; index += kBackwardRows * step) {
    typename A::Raw raw_x[kBackwardRows], raw_dy[kBackwardRows];
#pragma unroll
    for (int i = 0; i < kBackwardRows; ++i) {
      if (index + i * step >= a.count) continue;
      raw_x[i] = A::load(x + index + i * step);
      raw_dy[i] = A::load(dy + index + i * step);
    }
#pragma unroll
    for (int i = 0; i < kBackwardRows; ++i) {
      if (index + i * step >= a.count) continue;
      float values[A::kCount], g[A::kCount];
      A::unpack(raw_x[i], values);
      A::unpack(raw_dy[i], g);
#pragma unroll
      for (int k = 0; k < A::kCount; ++k) {
        g[k] *= gelu_slope<kTanh>(values[k] + bias[k]);
        sums[k] += g[k];
      }
      if (dx != nullptr) A::store(dx + index + i * step, g);
    }
  }
  if (a.partials == nullptr) return;
#pragma unroll
  for (int k = 0; k < A::kCount; ++k) {
    row_sums[(k * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x] = sums[k];
  }
  __syncthreads();
  if (threadIdx.y > 0 || !active) return;
#pragma unroll
  for (int k = 0; k < A::kCount; ++k) {
    float sum = 0.0f;
    for (unsigned y = 0; y < blockDim.y; ++y) sum += row_sums[(k * blockDim.y + y) * blockDim.x + threadIdx.x];
    a.partials[blockIdx.y * a.width + column + k] = sum;
  }
}

inline bool bias_gelu_is_wide(const BiasGelu& a, int64_t elements_per_access) {
  return a.width % elements_per_access == 0 && a.count % elements_per_access == 0 && is_aligned(a.x) &&
         is_aligned(a.bias.data) && is_aligned(a.y) && is_aligned(a.dy) && is_aligned(a.dx);
}

// Runs f(T{}, wide, tanh, tiles) with the types that pick the kernel.
template <typename F>
void for_bias_gelu_kernel(const BiasGelu& a, const F& f) {
  for_device_dtype(a.dtype, [&]<typename T>(T element) {
    constexpr int64_t kCount = Access<T, true>::kCount;
    const bool wide = bias_gelu_is_wide(a, kCount);
    const BiasGeluTiles tiles(a.count, a.width, wide ? kCount : 1);
    const auto with_width = [&](auto wide_constant) {
      if (a.tanh) {
        f(element, wide_constant, std::true_type{}, tiles);
      } else {
        f(element, wide_constant, std::false_type{}, tiles);
      }
    };
    if (wide) {
      with_width(std::true_type{});
    } else {
      with_width(std::false_type{});
    }
  });
}

inline void launch_bias_gelu_forward(const BiasGelu& a, cudaStream_t stream) {
  if (a.count == 0) return;
  for_bias_gelu_kernel(a, [&]<typename T, typename Wide, typename Tanh>(T, Wide, Tanh, const BiasGeluTiles& tiles) {
    const int64_t rows_per_block = static_cast<int64_t>(tiles.threads_y) * kForwardRows;
    const int64_t blocks_y = std::min<int64_t>((tiles.rows + rows_per_block - 1) / rows_per_block, 65535);
    auto* kernel = bias_gelu_forward_kernel<T, Wide::value, Tanh::value>;
    FM_LAUNCH(kernel, dim3(tiles.blocks_x, static_cast<unsigned>(blocks_y)), dim3(tiles.threads_x, tiles.threads_y),
              stream, a);
  });
}

// How many rows of partial sums (equally: blocks along the rows) the backward wants. Enough to fill the GPU once; more,
// to 8 blocks a multiprocessor, while the partial sums (8 bytes a column, written and read) stay below 2% of the
// traffic (at least 6 bytes an element).
inline int64_t bias_gelu_parts(const BiasGelu& a, int multiprocessors) {
  int64_t parts = 1;
  for_bias_gelu_kernel(a, [&](auto, auto, auto, const BiasGeluTiles& tiles) {
    const int64_t fill = (multiprocessors + tiles.blocks_x - 1) / tiles.blocks_x;
    const int64_t affordable = std::max(fill, tiles.rows * (a.dtype == DType::kFloat32 ? 12 : 6) / 400);
    const int64_t rows_per_block = static_cast<int64_t>(tiles.threads_y) * kBackwardRows;
    const int64_t useful = (tiles.rows + rows_per_block - 1) / rows_per_block;
    parts = std::clamp<int64_t>(std::min({8 * fill, affordable, useful}), 1, 65535);
  });
  return parts;
}

inline void launch_bias_gelu_backward(const BiasGelu& a, cudaStream_t stream) {
  for_bias_gelu_kernel(a, [&]<typename T, typename Wide, typename Tanh>(T, Wide, Tanh, const BiasGeluTiles& tiles) {
    auto* kernel = bias_gelu_backward_kernel<T, Wide::value, Tanh::value>;
    FM_LAUNCH(kernel, dim3(tiles.blocks_x, static_cast<unsigned>(a.parts)), dim3(tiles.threads_x, tiles.threads_y),
              stream, a);
  });
  if (a.partials == nullptr) return;
  launch_finish_column_sums({a.partials, a.parts, a.width, a.width, {a.dbias, {nullptr, a.dtype}}}, stream);
}

}  // namespace fm

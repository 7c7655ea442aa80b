// CUDA kernels of bias_gelu, bias_swiglu and bias_geglu and their launches, on plain pointers, without torch.
#pragma once

#include <cstdint>

#include "activation/functions.h"
#include "cuda/column_sums.cuh"
#include "cuda/row_grid.cuh"
#include "cuda/vector_access.cuh"

namespace fm {

// Arithmetic in the GPU's fast forms.
struct DeviceActivationMath {
  static constexpr bool kUnderflows = true;
  static FM_DEVICE float clamp(float u, float limit) { return fminf(fmaxf(u, -limit), limit); }
  static FM_DEVICE float exp2(float w) { return fast_exp2(w); }
  static FM_DEVICE float reciprocal(float x) { return fast_reciprocal(x); }
};

// Arguments of the kernels. y and dy hold `count` elements as rows of `width`. So do x and dx, except in gated
// activations: their rows have twice the width, the gate first. If the op does not fix the width, the last row may be
// short.
struct ActivationArguments {
  DType dtype;
  const void* x;
  ConstParameter bias;
  int64_t count, width;
  RowShares shares;  // of blockIdx.y
  void* y;           // forward
  const void* dy;    // backward, from here on
  void* dx;          // null: not wanted
  float* partials;   // [shares.blocks, width of x]; null: not wanted
  MutableParameter dbias;
};

inline constexpr int kActivationThreads = 512;
inline constexpr int64_t kWidthWithoutBias = 4096;

// How a kernel uses a multiprocessor: rows that a thread has in flight at a time, and blocks that must fit. 32 KiB or
// more in flight keep HBM busy on every GPU since the A100: threads * blocks * rows * loads a row * 16 bytes.
template <bool kGated>
struct ForwardPlan {
  static constexpr int kRows = kGated ? 2 : 3, kBlocks = 2;  // 64 KiB, 48 KiB
  static constexpr int kStreams = kGated ? 3 : 2;            // arrays of the size of y that are read or written
};
template <bool kGated>
struct BackwardPlan {
  static constexpr int kRows = 2, kBlocks = kGated ? 1 : 2;  // 48 KiB, 64 KiB
  static constexpr int kStreams = kGated ? 5 : 3;
};

// A thread keeps its columns and walks down the rows: its bias is loaded once, its sums stay in registers. A block is
// threads_x accesses by threads_y rows.
struct ActivationTiles {
  int64_t rows, accesses;
  int threads_x, threads_y;
  unsigned blocks_x;
  ActivationTiles(int64_t count, int64_t width, int64_t elements_per_access)
      : rows((count + width - 1) / width), accesses((width + elements_per_access - 1) / elements_per_access) {
    threads_x = 1;
    while (threads_x < 32 && threads_x < accesses) threads_x *= 2;
    threads_y = kActivationThreads / threads_x;
    blocks_x = static_cast<unsigned>((accesses + threads_x - 1) / threads_x);
  }

  // A block costs `extra` bytes a column: the bias read, partial sums written and read.
  RowShares shares(int64_t slots, int64_t rows_in_flight, int64_t bytes, int64_t extra) const {
    return RowGrid{rows, threads_y, rows_in_flight, blocks_x, slots, bytes, extra}.shares();
  }
};

// The end of this block's elements; the last row may be short.
FM_DEVICE int64_t end_of_rows(const ActivationArguments& a) {
  const int64_t end = a.shares.end(blockIdx.y) * a.width;
  return end < a.count ? end : a.count;
}

// The bias of this thread's columns, read from memory once a block.
template <int kCount, int kParts>
FM_DEVICE void share_bias(const ActivationArguments& a, int64_t column, bool active, float (&bias)[kParts][kCount]) {
  FM_SHARED(float, shared_bias, kParts* kCount * 32);
  if (a.bias.data == nullptr) {
#pragma unroll
    for (int i = 0; i < kParts * kCount; ++i) bias[i / kCount][i % kCount] = 0.0f;
    return;
  }
  if (threadIdx.y == 0 && active) {
#pragma unroll
    for (int half = 0; half < kParts; ++half) {
      load_parameter(a.bias, half * a.width + column, 0.0f, bias[half]);
#pragma unroll
      for (int k = 0; k < kCount; ++k) shared_bias[(half * kCount + k) * 32 + threadIdx.x] = bias[half][k];
    }
  }
  __syncthreads();
  if (!active) return;
#pragma unroll
  for (int i = 0; i < kParts * kCount; ++i) bias[i / kCount][i % kCount] = shared_bias[i * 32 + threadIdx.x];
}

template <typename T, bool kWide, typename Activation, bool kGated>
__global__ void __launch_bounds__(kActivationThreads, ForwardPlan<kGated>::kBlocks)
    activation_forward_kernel(ActivationArguments a) {
  using A = Access<T, kWide>;
  constexpr int kParts = kGated ? 2 : 1, kRows = ForwardPlan<kGated>::kRows;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * A::kCount;
  const bool active = column < a.width;
  float bias[kParts][A::kCount];
  share_bias(a, column, active, bias);
  if (!active) return;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const int64_t row_step = static_cast<int64_t>(blockDim.y) * a.width;
  const int64_t end = end_of_rows(a);
  int64_t index = (a.shares.begin(blockIdx.y) + threadIdx.y) * a.width + column;
  int64_t x_index = kParts * (index - column) + column;
  for (; index < end; index += kRows * row_step, x_index += kParts * kRows * row_step) {
    typename A::Raw raw[kRows][kParts];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (index + i * row_step >= end) continue;
#pragma unroll
      for (int half = 0; half < kParts; ++half) {
        raw[i][half] = A::load(x + x_index + kParts * i * row_step + half * a.width);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (index + i * row_step >= end) continue;
      float values[kParts][A::kCount];
#pragma unroll
      for (int half = 0; half < kParts; ++half) A::unpack(raw[i][half], values[half]);
#pragma unroll
      for (int k = 0; k < A::kCount; ++k) {
        values[0][k] = Activation::template at<DeviceActivationMath>(values[0][k] + bias[0][k]).value;
        if constexpr (kGated) values[0][k] *= values[1][k] + bias[1][k];
      }
      A::store(y + index + i * row_step, values[0]);
    }
  }
}

// One row of the backward, from x and dy as loaded: stores dx in out[half] and adds it to sums.
template <typename A, typename Activation, int kParts, typename T>
FM_DEVICE void activation_gradient(const typename A::Raw (&raw)[kParts + 1], const float (&bias)[kParts][A::kCount],
                                   float (&sums)[kParts][A::kCount], T* dx, int64_t width) {
  float values[kParts + 1][A::kCount];
#pragma unroll
  for (int i = 0; i <= kParts; ++i) A::unpack(raw[i], values[i]);
#pragma unroll
  for (int k = 0; k < A::kCount; ++k) {
    const ValueAndSlope f = Activation::template at<DeviceActivationMath>(values[0][k] + bias[0][k]);
    const float dy = values[kParts][k];
    values[0][k] = dy * f.slope;
    if constexpr (kParts == 2) {
      values[0][k] *= values[1][k] + bias[1][k];
      values[1][k] = dy * f.value;
      sums[1][k] += values[1][k];
    }
    sums[0][k] += values[0][k];
  }
  if (dx == nullptr) return;
#pragma unroll
  for (int half = 0; half < kParts; ++half) A::store(dx + half * width, values[half]);
}

template <typename T, bool kWide, typename Activation, bool kGated>
__global__ void __launch_bounds__(kActivationThreads, BackwardPlan<kGated>::kBlocks)
    activation_backward_kernel(ActivationArguments a) {
  using A = Access<T, kWide>;
  constexpr int kParts = kGated ? 2 : 1, kRows = BackwardPlan<kGated>::kRows;
  FM_SHARED(float, row_sums, kParts* A::kCount * kActivationThreads);
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * A::kCount;
  const bool active = column < a.width;
  float bias[kParts][A::kCount], sums[kParts][A::kCount] = {};
  share_bias(a, column, active, bias);
  const T* x = static_cast<const T*>(a.x);
  const T* dy = static_cast<const T*>(a.dy);
  T* dx = static_cast<T*>(a.dx);
  const int64_t row_step = static_cast<int64_t>(blockDim.y) * a.width;
  const int64_t end = end_of_rows(a);
  int64_t index = (a.shares.begin(blockIdx.y) + threadIdx.y) * a.width + column;
  int64_t x_index = kParts * (index - column) + column;
  if (!active) index = end;  // go on to the barrier below
  for (; index < end; index += kRows * row_step, x_index += kParts * kRows * row_step) {
    typename A::Raw raw[kRows][kParts + 1];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (index + i * row_step >= end) continue;
#pragma unroll
      for (int half = 0; half < kParts; ++half) {
        raw[i][half] = A::load(x + x_index + kParts * i * row_step + half * a.width);
      }
      raw[i][kParts] = A::load(dy + index + i * row_step);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (index + i * row_step >= end) continue;
      activation_gradient<A, Activation, kParts>(
          raw[i], bias, sums, dx == nullptr ? dx : dx + x_index + kParts * i * row_step, a.width);
    }
  }
  if (a.partials == nullptr) return;
  // Columns of a block: the columns of each thread side by side, then the second half of x. One thread adds one column,
  // so that neighbouring threads write neighbouring sums.
  const int block_columns = static_cast<int>(blockDim.x) * A::kCount, all_columns = kParts * block_columns;
#pragma unroll
  for (int i = 0; i < kParts * A::kCount; ++i) {
    row_sums[threadIdx.y * all_columns + i / A::kCount * block_columns + threadIdx.x * A::kCount + i % A::kCount] =
        sums[i / A::kCount][i % A::kCount];
  }
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * block_columns;
  for (int i = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); i < all_columns; i += kActivationThreads) {
    const int half = i / block_columns, own = i % block_columns;
    if (first + own >= a.width) continue;
    float sum = 0.0f;
    for (unsigned y = 0; y < blockDim.y; ++y) sum += row_sums[y * all_columns + i];
    a.partials[(blockIdx.y * kParts + half) * a.width + first + own] = sum;
  }
}

// Wide accesses need every row of every tensor to begin at a multiple of 16 bytes, the second half of x included.
inline bool activation_is_wide(const ActivationArguments& a, int64_t elements_per_access) {
  return a.width % elements_per_access == 0 && a.count % elements_per_access == 0 && is_aligned(a.x) &&
         is_aligned(a.bias.data) && is_aligned(a.y) && is_aligned(a.dy) && is_aligned(a.dx);
}

// Calls f(T{}, wide, tiles) with the type of the dtypes, to pick the kernel.
template <typename F>
void for_activation_kernel(const ActivationArguments& a, const F& f) {
  for_device_dtype(a.dtype, [&]<typename T>(T element) {
    constexpr int64_t kCount = Access<T, true>::kCount;
    if (activation_is_wide(a, kCount)) {
      f(element, std::true_type{}, ActivationTiles(a.count, a.width, kCount));
    } else {
      f(element, std::false_type{}, ActivationTiles(a.count, a.width, 1));
    }
  });
}

template <typename Activation, bool kGated>
void launch_activation_forward(ActivationArguments a, int multiprocessors, cudaStream_t stream) {
  using Plan = ForwardPlan<kGated>;
  for_activation_kernel(a, [&]<typename T, typename Wide>(T, Wide, const ActivationTiles& tiles) {
    const int64_t bytes = Plan::kStreams * sizeof(T), extra = a.bias.data == nullptr ? 0 : 4 * (kGated ? 2 : 1);
    a.shares = tiles.shares(multiprocessors * Plan::kBlocks, Plan::kRows, bytes, extra);
    auto* kernel = activation_forward_kernel<T, Wide::value, Activation, kGated>;
    FM_LAUNCH(kernel, dim3(tiles.blocks_x, static_cast<unsigned>(a.shares.blocks)),
              dim3(tiles.threads_x, tiles.threads_y), stream, a);
  });
}

// The rows of each block in the backward; there are as many rows of partial sums as blocks.
template <bool kGated>
RowShares activation_shares(const ActivationArguments& a, bool need_dbias, int multiprocessors) {
  using Plan = BackwardPlan<kGated>;
  RowShares shares{};
  for_activation_kernel(a, [&]<typename T, typename Wide>(T, Wide, const ActivationTiles& tiles) {
    const int64_t bytes = Plan::kStreams * sizeof(T), extra = (need_dbias ? 12 : 4) * (kGated ? 2 : 1);
    shares = tiles.shares(multiprocessors * Plan::kBlocks, Plan::kRows, bytes, extra);
  });
  return shares;
}

template <typename Activation, bool kGated>
void launch_activation_backward(const ActivationArguments& a, cudaStream_t stream) {
  for_activation_kernel(a, [&]<typename T, typename Wide>(T, Wide, const ActivationTiles& tiles) {
    auto* kernel = activation_backward_kernel<T, Wide::value, Activation, kGated>;
    FM_LAUNCH(kernel, dim3(tiles.blocks_x, static_cast<unsigned>(a.shares.blocks)),
              dim3(tiles.threads_x, tiles.threads_y), stream, a);
  });
  if (a.partials == nullptr) return;
  const int64_t width = (kGated ? 2 : 1) * a.width;
  launch_finish_column_sums({a.partials, a.shares.blocks, width, width, {a.dbias, {nullptr, a.dtype}}}, stream);
}

}  // namespace fm

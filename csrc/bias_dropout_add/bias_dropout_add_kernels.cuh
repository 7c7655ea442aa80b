// CUDA kernels of bias_dropout_add, on plain pointers, without torch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/column_sums.cuh"
#include "cuda/row_grid.cuh"
#include "cuda/vector_access.cuh"
#include "philox.h"

#include "global_rows.h"

namespace fm {

// Arguments of the kernels. All tensors hold `count` elements as rows of `width`. Without a bias and a slice the width
// is free, and the last row may be short.
struct BiasDropoutAdd {
  DType x_dtype, dtype;  // of x and dx; of residual, y and dy
  int64_t count, width;
  RowShares shares;  // of blockIdx.y
  GlobalRows rows;
  const int64_t* rng_state;  // null: nothing is random, every element is multiplied by scale
  uint32_t threshold;  // times 2^16
  float scale;
  const void* x;  // forward
  ConstParameter bias;
  const void* residual;
  void* y;
  const void* dy;   // backward, from here on
  void* dx;         // null: not wanted
  float* partials;  // [shares.blocks, width]; null: not wanted
  MutableParameter dbias;
};

inline constexpr int kDropoutThreads = 512;
inline constexpr int kDropoutBlocksPerMultiprocessor = 2;
// Rows that a thread has in flight at a time.
inline constexpr int kDropoutRows = 2;
inline constexpr int64_t kDropoutWidthOfWhole = 4096;

// kCount elements in one access: 128 bits, 64 for 16-bit values beside float32 ones, or one element.
template <typename T, int kCount>
struct Run {
  static constexpr bool kHalf = kCount * sizeof(T) == 8 && kCount > 1;
  using Full = Access<T, (kCount > 1)>;
  using Raw = std::conditional_t<kHalf, uint2, typename Full::Raw>;

  static FM_DEVICE Raw load(const T* address) { return *reinterpret_cast<const Raw*>(address); }
  static FM_DEVICE void unpack(const Raw& raw, float (&values)[kCount]) {
    if constexpr (kHalf) {
      unpack_pair<T>(raw.x, values[0], values[1]);
      unpack_pair<T>(raw.y, values[2], values[3]);
    } else {
      Full::unpack(raw, values);
    }
  }
  static FM_DEVICE void store(T* address, const float (&values)[kCount]) {
    if constexpr (kHalf) {
      *reinterpret_cast<uint2*>(address) =
          uint2{pack_pair<T>(values[0], values[1]), pack_pair<T>(values[2], values[3])};
    } else {
      Full::store_whole(address, values);
    }
  }
};

// The factors of the kCount elements from global index `index` on. kAligned: index is a multiple of kCount. Otherwise a
// run of several elements touches two Philox blocks.
template <int kCount, bool kAligned>
FM_DEVICE void dropout_factors(const PhiloxStream& stream, uint32_t threshold, float scale, int64_t index,
                               float (&factors)[kCount]) {
  const uint64_t block = static_cast<uint64_t>(index) / 8;
  const uint32_t half = static_cast<uint32_t>(index) % 8;
  constexpr int kWords = kAligned || kCount == 1 ? 4 : 8;
  uint32_t words[kWords];
#pragma unroll
  for (int i = 0; i < kWords / 4; ++i) philox_block(stream, block + i, words + 4 * i);
  // Shifts with constant indices only, so that the words stay in registers.
  if constexpr (!kAligned || kCount < 8) {
#pragma unroll
    for (int i = 0; i + 2 < kWords; ++i) words[i] = half & 4 ? words[i + 2] : words[i];
  }
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i + 1 < kWords; ++i) words[i] = half & 2 ? words[i + 1] : words[i];
#pragma unroll
    for (int i = 0; i + 1 < kWords; ++i) words[i] = half & 1 ? words[i] >> 16 | words[i + 1] << 16 : words[i];
  }
  // The upper half of a word is below the threshold if the whole word is.
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    factors[k] = (k % 2 == 0 ? words[k / 2] << 16 : words[k / 2]) >= threshold ? scale : 0.0f;
  }
}

// The elements of one thread: kCount columns that it keeps, in every blockDim.y-th row of its block. A block has
// blockDim.x runs of columns: one warp, so that there are many blocks and few rows of partial sums.
template <int kCount>
struct DropoutTile {
  int64_t column, row, end;  // end: of the elements of the block's rows; the last row may be short
  bool active;
  FM_DEVICE DropoutTile(const BiasDropoutAdd& a)
      : column((static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kCount),
        row(a.shares.begin(blockIdx.y) + threadIdx.y),
        end(a.shares.end(blockIdx.y) * a.width),
        active(column < a.width) {
    if (end > a.count) end = a.count;
  }
};

template <typename TX, typename T, int kCount, bool kAligned>
__global__ void __launch_bounds__(kDropoutThreads, kDropoutBlocksPerMultiprocessor)
    bias_dropout_add_forward_kernel(BiasDropoutAdd a) {
  using AX = Run<TX, kCount>;
  using A = Run<T, kCount>;
  FM_SHARED(float, shared_bias, 32 * kCount);
  const DropoutTile<kCount> tile(a);
  float bias[kCount];
  // The bias is read once a block.
  if (threadIdx.y == 0 && tile.active) {
    load_parameter(a.bias, tile.column, 0.0f, bias);
#pragma unroll
    for (int k = 0; k < kCount; ++k) shared_bias[k * 32 + threadIdx.x] = bias[k];
  }
  __syncthreads();
  if (!tile.active) return;
#pragma unroll
  for (int k = 0; k < kCount; ++k) bias[k] = shared_bias[k * 32 + threadIdx.x];
  PhiloxStream stream{};
  if (a.rng_state != nullptr) stream = philox_stream(a.rng_state);
  const TX* x = static_cast<const TX*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  const int64_t skip = static_cast<int64_t>(blockDim.y) * a.width;
  RunningRow mask_row(a.rows, tile.row, blockDim.y, a.width);
  for (int64_t index = tile.row * a.width + tile.column; index < tile.end; index += kDropoutRows * skip) {
    typename AX::Raw raw_x[kDropoutRows];
    typename A::Raw raw_residual[kDropoutRows];
#pragma unroll
    for (int i = 0; i < kDropoutRows; ++i) {
      if (index + i * skip >= tile.end) continue;
      raw_x[i] = AX::load(x + index + i * skip);
      raw_residual[i] = A::load(residual + index + i * skip);
    }
#pragma unroll
    for (int i = 0; i < kDropoutRows; ++i) {
      if (index + i * skip >= tile.end) continue;
      float factors[kCount], values[kCount], total[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) factors[k] = a.scale;
      if (a.rng_state != nullptr) {
        dropout_factors<kCount, kAligned>(stream, a.threshold, a.scale, mask_row.index() + tile.column, factors);
        mask_row.advance();
      }
      AX::unpack(raw_x[i], values);
      A::unpack(raw_residual[i], total);
#pragma unroll
      for (int k = 0; k < kCount; ++k) total[k] += (values[k] + bias[k]) * factors[k];
      A::store(y + index + i * skip, total);
    }
  }
}

template <typename TX, typename T, int kCount, bool kAligned>
__global__ void __launch_bounds__(kDropoutThreads, kDropoutBlocksPerMultiprocessor)
    bias_dropout_add_backward_kernel(BiasDropoutAdd a) {
  using AX = Run<TX, kCount>;
  using A = Run<T, kCount>;
  FM_SHARED(float, row_sums, kDropoutThreads* kCount);
  const DropoutTile<kCount> tile(a);
  float sums[kCount] = {};
  PhiloxStream stream{};
  if (a.rng_state != nullptr) stream = philox_stream(a.rng_state);
  const T* dy = static_cast<const T*>(a.dy);
  TX* dx = static_cast<TX*>(a.dx);
  const int64_t skip = static_cast<int64_t>(blockDim.y) * a.width;
  RunningRow mask_row(a.rows, tile.row, blockDim.y, a.width);
  int64_t index = tile.active ? tile.row * a.width + tile.column : tile.end;  // go to the barrier below
  for (; index < tile.end; index += kDropoutRows * skip) {
    typename A::Raw raw[kDropoutRows];
#pragma unroll
    for (int i = 0; i < kDropoutRows; ++i) {
      if (index + i * skip < tile.end) raw[i] = A::load(dy + index + i * skip);
    }
#pragma unroll
    for (int i = 0; i < kDropoutRows; ++i) {
      if (index + i * skip >= tile.end) continue;
      float factors[kCount], grad[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) factors[k] = a.scale;
      if (a.rng_state != nullptr) {
        dropout_factors<kCount, kAligned>(stream, a.threshold, a.scale, mask_row.index() + tile.column, factors);
        mask_row.advance();
      }
      A::unpack(raw[i], grad);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        grad[k] *= factors[k];
        sums[k] += grad[k];
      }
      if (dx != nullptr) AX::store(dx + index + i * skip, grad);
    }
  }
  if (a.partials == nullptr) return;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    row_sums[(k * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x] = sums[k];
  }
  __syncthreads();
  if (threadIdx.y > 0 || !tile.active) return;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    float sum = 0.0f;
    for (unsigned y = 0; y < blockDim.y; ++y) sum += row_sums[(k * blockDim.y + y) * blockDim.x + threadIdx.x];
    a.partials[blockIdx.y * a.width + tile.column + k] = sum;
  }
}

}  // namespace fm

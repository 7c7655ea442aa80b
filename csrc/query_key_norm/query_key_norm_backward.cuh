// CUDA kernels of the backward of query_key_norm and their launches, on plain pointers, without torch.
#pragma once

#include "cuda/column_sums.cuh"
#include "cuda/row_streams.cuh"

#include "query_key_norm_kernels.cuh"

namespace fm {

// With x the head, g = weight * dy after the rotation back, and rstd of x: dx = rstd g - x rstd^3 mean(g x). Both sums
// over a head are made at once.
struct HeadSums {
  float rstd, projection;  // projection: rstd^3 mean(g x)
};

FM_DEVICE HeadSums head_sums(float2 sums, float scale, float eps) {
  const float rstd = inverse_sqrt(sums.x * scale + eps);
  return {rstd, rstd * rstd * (sums.y * scale) * rstd};
}

// Copies the gradient of the values of one token, kCount elements at a time.
template <typename T, bool kWide>
FM_DEVICE void copy_values(const QueryKeyNorm& a, int64_t i0, int64_t i1) {
  using A = Access<T, kWide>;
  const TokenHeads<T> token(a.v, i0, i1);
  const int runs = static_cast<int>(a.head_dim) / A::kCount, total = runs * token.heads;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < total; i += 32) {
    const int head = i / runs, column = (i - head * runs) * A::kCount;
    float values[A::kCount];
    A::unpack(A::load(token.source(head) + column), values);
    A::store_whole(token.result(head) + column, values);
  }
}

// Every step-th head of q or k of one token: writes dx, and adds dy x rstd to the sums of this lane's columns.
template <typename T>
FM_DEVICE void backward_heads(const QueryKeyNorm& a, const TokenHeads<T>& token, const TokenHeads<T>& inputs,
                              const float* weight, const ShareAngles<16 / sizeof(T)>& angles, const HeadShare& share,
                              int lanes, float (&sums)[2][16 / sizeof(T)]) {
  using A = Access<T, true>;
  constexpr int kCount = A::kCount;
  const float scale = 1.0f / static_cast<float>(a.head_dim);
  // All lanes of the warp stay in the loop: they exchange sums.
#pragma unroll 1
  for (int base = 0; base < token.heads; base += 32 / lanes) {
    const int head = base + static_cast<int>(threadIdx.x) / lanes;
    const T *dy = token.source(head), *input = inputs.source(head);
    const typename A::Raw raw[4] = {A::load(dy + share.first), A::load(dy + share.second),
                                    A::load(input + share.first), A::load(input + share.second)};
    float g[2][kCount], x[2][kCount], w[kCount];
    A::unpack(raw[0], g[0]);
    A::unpack(raw[1], g[1]);
    A::unpack(raw[2], x[0]);
    A::unpack(raw[3], x[1]);
    angles.template turn<true>(share, g[0], g[1]);
    float2 own{squares(x[0], x[1]), 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      read_shared(weight + (i == 0 ? share.first : share.second), w);
#pragma unroll
      for (int j = 0; j < kCount; ++j) own.y += g[i][j] * w[j] * x[i][j];
    }
    if (!share.exists) own = {0.0f, 0.0f};
    const HeadSums found = head_sums(sum_of_lanes(own, lanes), scale, a.eps);
    const float counted = head < token.heads ? found.rstd : 0.0f;  // the sums count no head twice
    // The weights are read again: kept across the sums, they would cost a block of the four on a multiprocessor.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      read_shared(weight + opaque(i == 0 ? share.first : share.second), w);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float scaled = g[i][j] * counted;
        sums[i][j] += scaled * x[i][j];
        x[i][j] = scaled * w[j] - x[i][j] * found.projection;
      }
    }
    if (head < token.heads && share.exists) {
      A::store_whole(token.result(head) + share.first, x[0]);
      A::store_whole(token.result(head) + share.second, x[1]);
    }
  }
}

// Adds up the lanes of a warp that have the same columns, and writes their sums for this warp.
template <int kCount>
FM_DEVICE void gather_sums(const HeadShare& share, int lanes, const float (&sums)[2][kCount], float* of_warp) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float sum = sums[i][j];
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        const float other = from_lane(sum, offset);
        if (offset >= lanes) sum += other;
      }
      const bool writes = static_cast<int>(threadIdx.x) < lanes && share.exists;
      if (writes) of_warp[(i == 0 ? share.first : share.second) + j] = sum;
    }
  }
}

// Writes the sums of this block, warp by warp; `gathered` is [warps, 2, head_dim].
FM_DEVICE void write_partials(const QueryKeyNorm& a, const float* gathered) {
  const int columns = 2 * static_cast<int>(a.head_dim);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  for (int i = thread; i < columns; i += 32 * kHeadNormWarps) {
    float sum = gathered[i];
#pragma unroll
    for (int warp = 1; warp < kHeadNormWarps; ++warp) sum += gathered[warp * columns + i];
    a.partials[static_cast<int64_t>(blockIdx.x) * columns + i] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(32 * kHeadNormWarps, kHeadNormBackwardBlocks)
    query_key_norm_backward_kernel(QueryKeyNorm a, int lanes) {
  constexpr int kCount = 16 / sizeof(T);
  FM_DYNAMIC_SHARED(float, weights);  // then the sums of the warps
  load_weights(a, weights);
  __syncthreads();
  const HeadShare share(a, static_cast<int>(threadIdx.x) % lanes, kCount);
  float q_sums[2][kCount] = {}, k_sums[2][kCount] = {};
  const int n1 = static_cast<int>(a.n1), end = static_cast<int>(a.shares.end(blockIdx.x));
  for (int token = static_cast<int>(a.shares.begin(blockIdx.x)) + static_cast<int>(threadIdx.y); token < end;
       token += kHeadNormWarps) {
    const int i0 = token / n1, i1 = token - i0 * n1;
    const ShareAngles<kCount> angles(a, share, i0);
    backward_heads<T>(a, {a.q, i0, i1}, {a.q_input, i0, i1}, weights, angles, share, lanes, q_sums);
    backward_heads<T>(a, {a.k, i0, i1}, {a.k_input, i0, i1}, weights + a.head_dim, angles, share, lanes, k_sums);
    copy_values<T, true>(a, i0, i1);
  }
  float* gathered = weights + 2 * a.head_dim;
  float* of_warp = gathered + static_cast<int64_t>(threadIdx.y) * 2 * a.head_dim;
  gather_sums(share, lanes, q_sums, of_warp);
  gather_sums(share, lanes, k_sums, of_warp + a.head_dim);
  __syncthreads();
  write_partials(a, gathered);
}

// Where accesses are one element wide: a warp has one head at a time, reads it twice, and has its sums in shared memory.
template <typename T>
__global__ void __launch_bounds__(32 * kHeadNormWarps, kHeadNormBackwardBlocks)
    query_key_norm_backward_narrow_kernel(QueryKeyNorm a) {
  FM_DYNAMIC_SHARED(float, weights);  // then the sums of the warps
  float* gathered = weights + 2 * a.head_dim;
  float* of_warp = gathered + static_cast<int64_t>(threadIdx.y) * 2 * a.head_dim;
  load_weights(a, weights);
  for (int i = static_cast<int>(threadIdx.x); i < 2 * static_cast<int>(a.head_dim); i += 32) of_warp[i] = 0.0f;
  __syncthreads();
  const int shares = static_cast<int>(a.half + (a.head_dim - 2 * a.half + 1) / 2);
  const int n1 = static_cast<int>(a.n1), end = static_cast<int>(a.shares.end(blockIdx.x));
  for (int token = static_cast<int>(a.shares.begin(blockIdx.x)) + static_cast<int>(threadIdx.y); token < end;
       token += kHeadNormWarps) {
    const int i0 = token / n1, i1 = token - i0 * n1;
    for (int which = 0; which < 2; ++which) {
      const float* weight = weights + which * a.head_dim;
      float* sums = of_warp + which * a.head_dim;
      const TokenHeads<T> inputs(which == 0 ? a.q_input : a.k_input, i0, i1), heads(which == 0 ? a.q : a.k, i0, i1);
      for (int head = 0; head < heads.heads; ++head) {
        float g[2], x[2], w[2];
        const auto load = [&](const HeadShare& share) {
          load_two(heads.source(head), share, g);
          load_two(inputs.source(head), share, x);
          turn_two(a, share, i0, true, g);
          w[0] = weight[share.first];
          w[1] = share.has_second ? weight[share.second] : 0.0f;
        };
        float2 both{0.0f, 0.0f};
        for (int at = static_cast<int>(threadIdx.x); at < shares; at += 32) {
          load(HeadShare(a, at, 1));
          both = added(both, {x[0] * x[0] + x[1] * x[1], g[0] * w[0] * x[0] + g[1] * w[1] * x[1]});
        }
        const HeadSums found = head_sums(warp_sum(both), 1.0f / static_cast<float>(a.head_dim), a.eps);
        for (int at = static_cast<int>(threadIdx.x); at < shares; at += 32) {
          const HeadShare share(a, at, 1);
          load(share);
          g[0] *= found.rstd;
          g[1] *= found.rstd;
          sums[share.first] += g[0] * x[0];
          if (share.has_second) sums[share.second] += g[1] * x[1];
          x[0] = g[0] * w[0] - x[0] * found.projection;
          x[1] = g[1] * w[1] - x[1] * found.projection;
          store_two(heads.result(head), share, x);
        }
      }
    }
    copy_values<T, false>(a, i0, i1);
  }
  __syncthreads();
  write_partials(a, gathered);
}

// The tokens of each block in the backward; there are as many rows of partial sums as blocks.
inline RowShares query_key_norm_shares(const QueryKeyNorm& a, int multiprocessors) {
  const int64_t size = a.dtype == DType::kFloat32 ? 4 : 2;
  return token_shares(a, 1, static_cast<int64_t>(multiprocessors) * kHeadNormBackwardBlocks, 3 * size, 24);
}

inline void launch_query_key_norm_backward(const QueryKeyNorm& a, const MutableParameter& q_dweight,
                                           const MutableParameter& k_dweight, cudaStream_t stream) {
  const int64_t parts = a.shares.blocks;
  for_device_dtype(a.dtype, [&]<typename T>(T) {
    constexpr int kCount = 16 / sizeof(T);
    const bool wide = query_key_norm_is_wide(a, kCount);
    const dim3 grid(static_cast<unsigned>(parts)), block(32, kHeadNormWarps);
    const size_t shared = (1 + kHeadNormWarps) * 2 * a.head_dim * sizeof(float);
    if (wide) {
      auto* kernel = query_key_norm_backward_kernel<T>;
      FM_LAUNCH_DYNAMIC(kernel, grid, block, shared, stream, a, lanes_of_head(a, kCount));
    } else {
      auto* kernel = query_key_norm_backward_narrow_kernel<T>;
      FM_LAUNCH_DYNAMIC(kernel, grid, block, shared, stream, a);
    }
  });
  launch_finish_column_sums({a.partials, parts, 2 * a.head_dim, a.head_dim, {q_dweight, k_dweight}}, stream);
}

}  // namespace fm

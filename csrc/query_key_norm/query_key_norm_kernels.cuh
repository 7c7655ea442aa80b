// CUDA kernels of query_key_norm and their launches, on plain pointers, without torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "head_shares.cuh"

namespace fm {

// Normalises, scales and rotates every step-th head of q or k of one token.
template <typename T>
FM_DEVICE void forward_heads(const QueryKeyNorm& a, const TokenHeads<T>& token, const float* weight,
                             const ShareAngles<16 / sizeof(T)>& angles, const HeadShare& share, int lanes, int first,
                             int step) {
  using A = Access<T, true>;
  constexpr int kCount = A::kCount;
  const float scale = 1.0f / static_cast<float>(a.head_dim);
  // All lanes of the warp stay in the loop: they exchange sums.
#pragma unroll 1
  for (int base = first; base < token.heads; base += step) {
    const int head = base + static_cast<int>(threadIdx.x) / lanes;
    const T* source = token.source(head);
    const typename A::Raw raw[2] = {A::load(source + share.first), A::load(source + share.second)};
    float x[2][kCount], w[kCount];
    A::unpack(raw[0], x[0]);
    A::unpack(raw[1], x[1]);
    const float own = share.exists ? squares(x[0], x[1]) : 0.0f;
    const float rstd = inverse_sqrt(sum_of_lanes(own, lanes) * scale + a.eps);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      read_shared(weight + (i == 0 ? share.first : share.second), w);
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[i][j] = x[i][j] * rstd * w[j];
    }
    angles.template turn<false>(share, x[0], x[1]);
    if (head < token.heads && share.exists) {
      A::store_whole(token.result(head) + share.first, x[0]);
      A::store_whole(token.result(head) + share.second, x[1]);
    }
  }
}

// A warp has one token, so that its angles are read once; `lanes` of its lanes share a head, each with one share. If
// tokens are few, gridDim.y warps share the heads of one token.
template <typename T>
__global__ void __launch_bounds__(32 * kHeadNormWarps, kHeadNormBlocks) query_key_norm_kernel(QueryKeyNorm a, int lanes) {
  constexpr int kCount = 16 / sizeof(T);
  FM_DYNAMIC_SHARED(float, weights);
  load_weights(a, weights);
  __syncthreads();
  const HeadShare share(a, static_cast<int>(threadIdx.x) % lanes, kCount);
  const int at_once = 32 / lanes, step = at_once * static_cast<int>(gridDim.y);
  const int first = static_cast<int>(blockIdx.y) * at_once;
  const int n1 = static_cast<int>(a.n1), end = static_cast<int>(a.shares.end(blockIdx.x));
  for (int token = static_cast<int>(a.shares.begin(blockIdx.x)) + static_cast<int>(threadIdx.y); token < end;
       token += kHeadNormWarps) {
    const int i0 = token / n1, i1 = token - i0 * n1;
    const ShareAngles<kCount> angles(a, share, i0);
    forward_heads<T>(a, {a.q, i0, i1}, weights, angles, share, lanes, first, step);
    forward_heads<T>(a, {a.k, i0, i1}, weights + a.head_dim, angles, share, lanes, first, step);
  }
}

// The two elements of a share, or one and 0.
template <typename T>
FM_DEVICE void load_two(const T* head, const HeadShare& share, float (&x)[2]) {
  x[0] = to_float(head[share.first]);
  x[1] = share.has_second ? to_float(head[share.second]) : 0.0f;
}
FM_DEVICE void turn_two(const QueryKeyNorm& a, const HeadShare& share, int64_t position, bool back, float (&x)[2]) {
  float first[1] = {x[0]}, second[1] = {x[1]};
  const ShareAngles<1> angles(a, share, position);
  if (back) {
    angles.template turn<true>(share, first, second);
  } else {
    angles.template turn<false>(share, first, second);
  }
  x[0] = first[0];
  x[1] = second[0];
}
template <typename T>
FM_DEVICE void store_two(T* head, const HeadShare& share, const float (&x)[2]) {
  head[share.first] = from_float<T>(x[0]);
  if (share.has_second) head[share.second] = from_float<T>(x[1]);
}

// Where accesses are one element wide: a warp has one head at a time, and reads it twice.
template <typename T>
__global__ void __launch_bounds__(32 * kHeadNormWarps) query_key_norm_narrow_kernel(QueryKeyNorm a) {
  FM_DYNAMIC_SHARED(float, weights);
  load_weights(a, weights);
  __syncthreads();
  const int shares = static_cast<int>(a.half + (a.head_dim - 2 * a.half + 1) / 2);
  const int n1 = static_cast<int>(a.n1), end = static_cast<int>(a.shares.end(blockIdx.x));
  for (int token = static_cast<int>(a.shares.begin(blockIdx.x)) + static_cast<int>(threadIdx.y); token < end;
       token += kHeadNormWarps) {
    const int i0 = token / n1, i1 = token - i0 * n1;
    for (int which = 0; which < 2; ++which) {
      const float* weight = weights + which * a.head_dim;
      const TokenHeads<T> heads(which == 0 ? a.q : a.k, i0, i1);
      for (int head = static_cast<int>(blockIdx.y); head < heads.heads; head += static_cast<int>(gridDim.y)) {
        float sum = 0.0f, x[2];
        for (int at = static_cast<int>(threadIdx.x); at < shares; at += 32) {
          load_two(heads.source(head), HeadShare(a, at, 1), x);
          sum += x[0] * x[0] + x[1] * x[1];
        }
        const float rstd = inverse_sqrt(warp_sum(sum) / static_cast<float>(a.head_dim) + a.eps);
        for (int at = static_cast<int>(threadIdx.x); at < shares; at += 32) {
          const HeadShare share(a, at, 1);
          load_two(heads.source(head), share, x);
          x[0] = x[0] * rstd * weight[share.first];
          if (share.has_second) x[1] = x[1] * rstd * weight[share.second];
          turn_two(a, share, i0, false, x);
          store_two(heads.result(head), share, x);
        }
      }
    }
  }
}

inline bool heads_are_wide(const Heads& x, int64_t count) {
  const int64_t strides = x.stride0 | x.stride1 | x.stride_head | x.out_stride0 | x.out_stride1 | x.out_stride_head;
  return strides % count == 0 && is_aligned(x.data) && is_aligned(x.out);
}

inline bool query_key_norm_is_wide(const QueryKeyNorm& a, int64_t count) {
  bool wide = a.half % count == 0 && (a.head_dim - 2 * a.half) % (2 * count) == 0 && head_shares(a, count) <= 32;
  for (const Heads& x : {a.q, a.k, a.q_input, a.k_input, a.v}) wide = wide && heads_are_wide(x, count);
  return wide && is_aligned(a.cos.data) && is_aligned(a.sin.data);
}

// The lanes that share a head: a power of 2.
inline int lanes_of_head(const QueryKeyNorm& a, int64_t count) {
  int lanes = 1;
  while (lanes < head_shares(a, count)) lanes *= 2;
  return lanes;
}

inline void launch_query_key_norm(QueryKeyNorm a, int multiprocessors, cudaStream_t stream) {
  const int64_t num_heads = a.q.heads + a.k.heads;
  if (a.tokens == 0 || num_heads == 0) return;
  for_device_dtype(a.dtype, [&]<typename T>(T) {
    constexpr int kCount = 16 / sizeof(T);
    const bool wide = query_key_norm_is_wide(a, kCount);
    const int lanes = wide ? lanes_of_head(a, kCount) : 32;
    const int64_t slots = static_cast<int64_t>(multiprocessors) * kHeadNormBlocks;
    const int64_t full = (a.tokens + kHeadNormWarps - 1) / kHeadNormWarps;  // blocks with a token for each warp
    const int64_t splits = std::clamp<int64_t>(std::min(slots / full, num_heads * lanes / 32), 1, 65535);
    a.shares = token_shares(a, splits, slots, 2 * sizeof(T), 8);
    const dim3 grid(static_cast<unsigned>(a.shares.blocks), static_cast<unsigned>(splits)), block(32, kHeadNormWarps);
    const size_t shared = 2 * a.head_dim * sizeof(float);
    if (wide) {
      auto* kernel = query_key_norm_kernel<T>;
      FM_LAUNCH_DYNAMIC(kernel, grid, block, shared, stream, a, lanes);
    } else {
      auto* kernel = query_key_norm_narrow_kernel<T>;
      FM_LAUNCH_DYNAMIC(kernel, grid, block, shared, stream, a);
    }
  });
}

}  // namespace fm

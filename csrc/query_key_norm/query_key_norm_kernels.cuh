// CUDA kernels of query_key_norm and their launches, on plain pointers, without torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/column_sums.cuh"
#include "cuda/row_reduction.cuh"
#include "cuda/vector_access.cuh"
#include "heads/heads.h"

namespace fm {

struct QueryKeyNorm {
  DType dtype;
  float eps;
  Heads q, k;                          // forward: x and y; backward: dy and dx
  Heads q_input, k_input;              // backward: x
  Heads v;                             // backward: a gradient that is copied
  ConstParameter q_weight, k_weight;   // [head_dim]
  ConstParameter cos, sin;             // [positions, half]; a token of sequence position i0 has row i0
  int64_t tokens, n1, head_dim, half;  // n1: tokens of a position
  float* partials;                     // backward: [blocks, 2, head_dim]
};

inline constexpr int kHeadNormWarps = 4;
inline constexpr int kHeadNormBlocks = 8;          // of a multiprocessor, in forward
inline constexpr int kHeadNormBackwardBlocks = 4;  // as many as its registers allow

// A lane's share of a head: two runs of kCount elements. In the part that rotates they are partners, `half` apart; the
// runs of the other part are divided into two halves, of which the second may have one run less.
struct HeadShare {
  int first, second;
  bool exists, has_second, rotates;
  int pair;  // of the first element, in the tables

  FM_DEVICE HeadShare(const QueryKeyNorm& a, int share, int count) {
    const int half = static_cast<int>(a.half), pairs = half / count;
    const int runs = (static_cast<int>(a.head_dim) - 2 * half) / count, rest = (runs + 1) / 2;
    rotates = share < pairs;
    exists = share < pairs + rest;
    pair = rotates ? share * count : 0;
    first = rotates ? pair : 2 * half + (share - pairs) * count;
    second = rotates ? half + pair : first + rest * count;
    has_second = rotates || share - pairs + rest < runs;
  }
};

inline int64_t head_shares(const QueryKeyNorm& a, int64_t count) {
  return a.half / count + ((a.head_dim - 2 * a.half) / count + 1) / 2;
}

template <int kCount>
struct ShareAngles {
  float cos[kCount], sin[kCount];

  FM_DEVICE ShareAngles(const QueryKeyNorm& a, const HeadShare& share, int64_t position) {
    if (share.exists && share.rotates) {
      load_parameter(a.cos, position * a.half + share.pair, 1.0f, cos);
      load_parameter(a.sin, position * a.half + share.pair, 0.0f, sin);
    }
  }
  // Rotates pairs (x, y) by the angles, or back.
  template <bool kBack>
  FM_DEVICE void turn(const HeadShare& share, float (&x)[kCount], float (&y)[kCount]) const {
    if (!share.rotates) return;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float s = kBack ? -sin[j] : sin[j], first = x[j] * cos[j] - y[j] * s;
      y[j] = y[j] * cos[j] + x[j] * s;
      x[j] = first;
    }
  }
};

// The two runs of a share, as they lie in memory and as numbers; a run that does not exist is 0.
template <typename T, bool kWide>
struct Runs {
  using A = Access<T, kWide>;
  typename A::Raw raw[2];

  FM_DEVICE void load(const T* head, const HeadShare& share, bool valid) {
    raw[0] = valid && share.exists ? A::load(head + share.first) : typename A::Raw{};
    raw[1] = valid && share.exists && share.has_second ? A::load(head + share.second) : typename A::Raw{};
  }
  FM_DEVICE void unpack(float (&x)[A::kCount], float (&y)[A::kCount]) const {
    A::unpack(raw[0], x);
    A::unpack(raw[1], y);
  }
  static FM_DEVICE void store(T* head, const HeadShare& share, const float (&x)[A::kCount],
                              const float (&y)[A::kCount]) {
    A::store_whole(head + share.first, x);
    if (share.has_second) A::store_whole(head + share.second, y);
  }
};

// Weights of q, then of k, in shared memory.
FM_DEVICE void load_weights(const QueryKeyNorm& a, float* weights) {
  const int head_dim = static_cast<int>(a.head_dim);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  for (int i = thread; i < 2 * head_dim; i += 32 * kHeadNormWarps) {
    float value[1];
    load_parameter(i < head_dim ? a.q_weight : a.k_weight, i < head_dim ? i : i - head_dim, 1.0f, value);
    weights[i] = value[0];
  }
}

template <int kCount>
FM_DEVICE void read_shared(const float* values, bool valid, float (&x)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) x[j] = 0.0f;
  if (!valid) return;
  if constexpr (kCount == 1) {
    x[0] = values[0];
  } else {
#pragma unroll
    for (int j = 0; j < kCount; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(values + j);
      x[j] = four.x;
      x[j + 1] = four.y;
      x[j + 2] = four.z;
      x[j + 3] = four.w;
    }
  }
}

// The sum over the `lanes` neighbouring lanes that share a head.
template <typename Value>
FM_DEVICE Value sum_of_lanes(Value value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value = added(value, from_lane(value, offset));
  return value;
}

template <int kCount>
FM_DEVICE float squares(const float (&x)[kCount], const float (&y)[kCount]) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kCount; ++j) sum += x[j] * x[j] + y[j] * y[j];
  return sum;
}

template <typename T>
FM_DEVICE const T* input_of(const Heads& x, int64_t i0, int64_t i1, int64_t head) {
  return static_cast<const T*>(x.data) + i0 * x.stride0 + i1 * x.stride1 + head * x.stride_head;
}
template <typename T>
FM_DEVICE T* output_of(const Heads& x, int64_t i0, int64_t i1, int64_t head) {
  return static_cast<T*>(x.out) + i0 * x.out_stride0 + i1 * x.out_stride1 + head * x.out_stride_head;
}

// A warp has one token, so that its angles are read once; `lanes` of its lanes share a head, each with one share. If
// tokens are few, gridDim.y warps share the heads of one token.
template <typename T>
__global__ void __launch_bounds__(32 * kHeadNormWarps) query_key_norm_kernel(QueryKeyNorm a, int lanes) {
  using A = Access<T, true>;
  constexpr int kCount = A::kCount;
  FM_DYNAMIC_SHARED(float, weights);
  load_weights(a, weights);
  __syncthreads();
  const HeadShare share(a, static_cast<int>(threadIdx.x) % lanes, kCount);
  const int num_heads = static_cast<int>(a.q.heads + a.k.heads), q_heads = static_cast<int>(a.q.heads);
  const int at_once = 32 / lanes, step = at_once * static_cast<int>(gridDim.y);
  const float scale = 1.0f / static_cast<float>(a.head_dim);
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kHeadNormWarps + threadIdx.y; token < a.tokens;
       token += static_cast<int64_t>(gridDim.x) * kHeadNormWarps) {
    const int64_t i0 = token / a.n1, i1 = token - i0 * a.n1;
    const ShareAngles<kCount> angles(a, share, i0);
    // All lanes stay in the loop: they exchange sums.
    for (int base = static_cast<int>(blockIdx.y) * at_once; base < num_heads; base += step) {
      const int head = base + static_cast<int>(threadIdx.x) / lanes;
      const bool valid = head < num_heads && share.exists, is_q = head < q_heads;
      const Heads& heads = is_q ? a.q : a.k;
      const int own = is_q ? head : head - q_heads;
      Runs<T, true> runs;
      runs.load(input_of<T>(heads, i0, i1, own), share, valid);
      float x[kCount], y[kCount], first[kCount], second[kCount];
      runs.unpack(x, y);
      const float mean = scale * sum_of_lanes(squares(x, y), lanes);
      const float rstd = inverse_sqrt(mean + a.eps);
      const float* weight = weights + (is_q ? 0 : a.head_dim);
      read_shared(weight + share.first, valid, first);
      read_shared(weight + share.second, valid && share.has_second, second);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        x[j] = x[j] * rstd * first[j];
        y[j] = y[j] * rstd * second[j];
      }
      angles.template turn<false>(share, x, y);
      if (valid) Runs<T, true>::store(output_of<T>(heads, i0, i1, own), share, x, y);
    }
  }
}

// Where accesses are one element wide: a warp has one head at a time, and reads it twice.
template <typename T>
__global__ void __launch_bounds__(32 * kHeadNormWarps) query_key_norm_narrow_kernel(QueryKeyNorm a) {
  using Narrow = Runs<T, false>;
  FM_DYNAMIC_SHARED(float, weights);
  load_weights(a, weights);
  __syncthreads();
  const int num_heads = static_cast<int>(a.q.heads + a.k.heads), q_heads = static_cast<int>(a.q.heads);
  const int shares = static_cast<int>(a.half + (a.head_dim - 2 * a.half + 1) / 2);
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kHeadNormWarps + threadIdx.y; token < a.tokens;
       token += static_cast<int64_t>(gridDim.x) * kHeadNormWarps) {
    const int64_t i0 = token / a.n1, i1 = token - i0 * a.n1;
    for (int head = static_cast<int>(blockIdx.y); head < num_heads; head += static_cast<int>(gridDim.y)) {
      const bool is_q = head < q_heads;
      const Heads& heads = is_q ? a.q : a.k;
      const int own = is_q ? head : head - q_heads;
      const T* from = input_of<T>(heads, i0, i1, own);
      float sum = 0.0f, x[1], y[1], first[1], second[1];
      for (int at = static_cast<int>(threadIdx.x); at < shares; at += 32) {
        const HeadShare share(a, at, 1);
        Narrow runs;
        runs.load(from, share, true);
        runs.unpack(x, y);
        sum += squares(x, y);
      }
      const float rstd = inverse_sqrt(warp_sum(sum) / static_cast<float>(a.head_dim) + a.eps);
      const float* weight = weights + (is_q ? 0 : a.head_dim);
      for (int at = static_cast<int>(threadIdx.x); at < shares; at += 32) {
        const HeadShare share(a, at, 1);
        Narrow runs;
        runs.load(from, share, true);
        runs.unpack(x, y);
        read_shared(weight + share.first, true, first);
        read_shared(weight + share.second, share.has_second, second);
        x[0] = x[0] * rstd * first[0];
        y[0] = y[0] * rstd * second[0];
        ShareAngles<1>(a, share, i0).template turn<false>(share, x, y);
        Narrow::store(output_of<T>(heads, i0, i1, own), share, x, y);
      }
    }
  }
}

inline bool heads_are_wide(const Heads& x, int64_t count) {
  const int64_t strides = x.stride0 | x.stride1 | x.stride_head | x.out_stride0 | x.out_stride1 | x.out_stride_head;
  return strides % count == 0 && is_aligned(x.data) && is_aligned(x.out);
}

inline bool query_key_norm_is_wide(const QueryKeyNorm& a, int64_t count) {
  bool wide = a.head_dim % count == 0 && a.half % count == 0 && head_shares(a, count) <= 32;
  for (const Heads& x : {a.q, a.k, a.q_input, a.k_input, a.v}) wide = wide && heads_are_wide(x, count);
  return wide && is_aligned(a.cos.data) && is_aligned(a.sin.data);
}

// The lanes that share a head: a power of 2.
inline int lanes_of_head(const QueryKeyNorm& a, int64_t count) {
  int lanes = 1;
  while (lanes < head_shares(a, count)) lanes *= 2;
  return lanes;
}

inline void launch_query_key_norm(const QueryKeyNorm& a, int multiprocessors, cudaStream_t stream) {
  const int64_t num_heads = a.q.heads + a.k.heads;
  if (a.tokens == 0 || num_heads == 0) return;
  for_device_dtype(a.dtype, [&]<typename T>(T) {
    constexpr int kCount = 16 / sizeof(T);
    const bool wide = query_key_norm_is_wide(a, kCount);
    const int lanes = wide ? lanes_of_head(a, kCount) : 32;
    const int64_t most = static_cast<int64_t>(multiprocessors) * kHeadNormBlocks;
    const int64_t blocks = std::min((a.tokens + kHeadNormWarps - 1) / kHeadNormWarps, most);
    const int64_t splits = std::clamp<int64_t>(std::min(most / blocks, num_heads * lanes / 32), 1, 65535);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(splits)), block(32, kHeadNormWarps);
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

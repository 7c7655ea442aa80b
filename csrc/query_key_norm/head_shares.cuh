// What a lane has of a head in the CUDA kernels of query_key_norm: its elements, angles and weights.
#pragma once

#include <cstdint>

#include "cuda/row_grid.cuh"
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
  RowShares shares;                    // tokens of blockIdx.x
  float* partials;                     // backward: [shares.blocks, 2, head_dim]
};

inline constexpr int kHeadNormWarps = 4;
inline constexpr int kHeadNormBlocks = 8;          // of a multiprocessor, in forward
inline constexpr int kHeadNormBackwardBlocks = 4;  // as many as its registers allow

// A lane's share of a head: two runs of kCount elements. In the part that rotates they are partners, `half` apart; the
// runs of the other part are divided into two halves. A lane without a share repeats the first one, and stores nothing.
struct HeadShare {
  int first, second;
  bool exists, has_second, rotates;  // has_second: false for the last one of an odd number of runs
  int pair;  // of the first element, in the tables

  FM_DEVICE HeadShare(const QueryKeyNorm& a, int lane, int count) {
    const int half = static_cast<int>(a.half), pairs = half / count;
    const int runs = (static_cast<int>(a.head_dim) - 2 * half) / count, rest = (runs + 1) / 2;
    exists = lane < pairs + rest;
    const int share = exists ? lane : 0;
    rotates = share < pairs;
    pair = rotates ? share * count : 0;
    first = rotates ? pair : 2 * half + (share - pairs) * count;
    second = rotates ? half + pair : first + rest * count;
    has_second = rotates || share - pairs + rest < runs;
  }
};

// The tokens of each block, beside `splits` blocks that share the heads of a token. bytes: of an element of a head; a
// block costs `extra` bytes for each column of a head. A warp has four tokens or more before a second wave of blocks is
// worth the wait for the weights.
inline RowShares token_shares(const QueryKeyNorm& a, int64_t splits, int64_t slots, int64_t bytes, int64_t extra) {
  const int64_t heads = a.q.heads + a.k.heads;
  return RowGrid{a.tokens, kHeadNormWarps, 4, splits, slots, heads * bytes / splits, extra}.shares();
}

inline int64_t head_shares(const QueryKeyNorm& a, int64_t count) {
  return a.half / count + ((a.head_dim - 2 * a.half) / count + 1) / 2;
}

template <int kCount>
struct ShareAngles {
  float cos[kCount], sin[kCount];

  FM_DEVICE ShareAngles(const QueryKeyNorm& a, const HeadShare& share, int64_t position) {
    if (share.rotates) {
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

// The heads of one token. Strides are 32-bit numbers of bytes, so that an address is one instruction.
template <typename T>
struct TokenHeads {
  const T* from;
  T* to;
  int from_stride, to_stride, heads;

  FM_DEVICE TokenHeads(const Heads& x, int64_t i0, int64_t i1)
      : from(static_cast<const T*>(x.data) + i0 * x.stride0 + i1 * x.stride1),
        to(static_cast<T*>(x.out) + i0 * x.out_stride0 + i1 * x.out_stride1),
        from_stride(static_cast<int>(x.stride_head) * static_cast<int>(sizeof(T))),
        to_stride(static_cast<int>(x.out_stride_head) * static_cast<int>(sizeof(T))),
        heads(static_cast<int>(x.heads)) {}
  // Beyond the last head this is the last one: lanes without a head take part in the exchange of sums.
  FM_DEVICE const T* source(int head) const {
    const int64_t bytes = static_cast<int64_t>(head < heads ? head : heads - 1) * from_stride;
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(from) + bytes);
  }
  FM_DEVICE T* result(int head) const {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(to) + static_cast<int64_t>(head) * to_stride);
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
FM_DEVICE void read_shared(const float* values, float (&x)[kCount]) {
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

// The sum over the `lanes` neighbouring lanes that share a head. All 5 exchanges are made: a loop would cost more.
template <typename Value>
FM_DEVICE Value sum_of_lanes(Value value, int lanes) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const Value other = from_lane(value, offset);
    if (offset < lanes) value = added(value, other);
  }
  return value;
}

template <int kCount>
FM_DEVICE float squares(const float (&x)[kCount], const float (&y)[kCount]) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kCount; ++j) sum += x[j] * x[j] + y[j] * y[j];
  return sum;
}

}  // namespace fm

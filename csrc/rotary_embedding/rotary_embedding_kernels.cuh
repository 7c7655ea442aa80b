// CUDA kernels of rotary_embedding and their launches, on plain pointers, without torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/vector_access.cuh"
#include "heads/heads.h"

#include "token_positions.h"

namespace fm {

struct Rotary {
  DType dtype;
  bool interleaved;
  float sign;  // sign of the angles: -1 rotates back
  Heads q, k;  // no k: k has 0 heads
  ConstParameter cos, sin;  // [table_rows, half]
  TokenPositions where;
  int64_t tokens, n1, head_dim, half;
};

inline constexpr int kRotaryWarps = 4;
// Blocks of a multiprocessor: as many as have registers without a spill. The compiler for sm_100 uses more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
inline constexpr int kRotaryBlocks = 5;
#else
inline constexpr int kRotaryBlocks = 6;
#endif
// Heads that a thread has in flight at a time.
inline constexpr int kRotaryHeads = 2;

// Loads kCount values of a table row, with the widest accesses that a multiple of 4 values allows.
template <int kCount>
FM_DEVICE void load_angles(const ConstParameter& table, int64_t index, float sign, bool valid, float* angles) {
  constexpr int kStep = kCount % 4 == 0 ? kCount : 1;
#pragma unroll
  for (int i = 0; i < kCount; i += kStep) {
    float values[kStep];
    if (valid) {
      load_parameter(table, index + i, 0.0f, values);
    } else {
#pragma unroll
      for (int j = 0; j < kStep; ++j) values[j] = word_to_float(0x7FC00000u);  // NaN
    }
#pragma unroll
    for (int j = 0; j < kStep; ++j) angles[i + j] = sign * values[j];
  }
}

// A thread's share of a head: two runs of kCount elements, `distance` apart. In both forms neighbouring threads have
// neighbouring runs, so that a warp's accesses leave no gaps. With kCount = 1 the two elements form a pair; in wide
// interleaved runs, pairs lie within a run.
template <int kCount, bool kInterleaved>
struct RotaryRuns {
  static constexpr bool kPairsInside = kInterleaved && kCount > 1;
  int64_t first, distance;
  float cos[kCount], sin[kCount];

  FM_DEVICE RotaryRuns(const Rotary& a, int64_t chunk, int64_t position) {
    const bool adjacent = kInterleaved && kCount == 1;
    first = adjacent ? 2 * chunk : chunk * kCount;
    distance = adjacent ? 1 : a.half;
    const bool valid = position >= 0;
    const int64_t row = position * a.half;
    if constexpr (kPairsInside) {
      // Half of the angles belong to the first run and half to the second.
      const int64_t pair = first / 2, other = (first + distance) / 2;
      load_angles<kCount / 2>(a.cos, row + pair, 1.0f, valid, cos);
      load_angles<kCount / 2>(a.cos, row + other, 1.0f, valid, cos + kCount / 2);
      load_angles<kCount / 2>(a.sin, row + pair, a.sign, valid, sin);
      load_angles<kCount / 2>(a.sin, row + other, a.sign, valid, sin + kCount / 2);
    } else {
      load_angles<kCount>(a.cos, row + chunk * kCount, 1.0f, valid, cos);
      load_angles<kCount>(a.sin, row + chunk * kCount, a.sign, valid, sin);
    }
  }

  FM_DEVICE void rotate(float (&x)[kCount], float (&y)[kCount]) const {
    if constexpr (kPairsInside) {
#pragma unroll
      for (int j = 0; j < kCount / 2; ++j) {
        turn(x[2 * j], x[2 * j + 1], cos[j], sin[j]);
        turn(y[2 * j], y[2 * j + 1], cos[kCount / 2 + j], sin[kCount / 2 + j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) turn(x[j], y[j], cos[j], sin[j]);
    }
  }

  static FM_DEVICE void turn(float& a, float& b, float cos, float sin) {
    const float rotated = a * cos - b * sin;
    b = b * cos + a * sin;
    a = rotated;
  }
};

// Rotates every step-th head of q or k of one token. Two loops, for q and for k, have fewer addresses to keep and to
// choose from than one over both.
template <typename T, int kCount, bool kInterleaved>
FM_DEVICE void rotate_heads(const Heads& x, int64_t i0, int64_t i1, int first, int step,
                            const RotaryRuns<kCount, kInterleaved>& runs) {
  using A = Access<T, (kCount > 1)>;
  const T* from = static_cast<const T*>(x.data) + i0 * x.stride0 + i1 * x.stride1 + first * x.stride_head + runs.first;
  T* to = static_cast<T*>(x.out) + i0 * x.out_stride0 + i1 * x.out_stride1 + first * x.out_stride_head + runs.first;
  const int64_t from_step = step * x.stride_head, to_step = step * x.out_stride_head;
  const int heads = static_cast<int>(x.heads);
#pragma unroll 1
  for (int head = first; head < heads; head += kRotaryHeads * step) {
    typename A::Raw raw[kRotaryHeads][2];
#pragma unroll
    for (int i = 0; i < kRotaryHeads; ++i) {
      if (head + i * step >= heads) continue;
      raw[i][0] = A::load(from + i * from_step);
      raw[i][1] = A::load(from + i * from_step + runs.distance);
    }
#pragma unroll
    for (int i = 0; i < kRotaryHeads; ++i) {
      if (head + i * step >= heads) continue;
      float first_run[kCount], second_run[kCount];
      A::unpack(raw[i][0], first_run);
      A::unpack(raw[i][1], second_run);
      runs.rotate(first_run, second_run);
      A::store_whole(to + i * to_step, first_run);
      A::store_whole(to + i * to_step + runs.distance, second_run);
    }
    from += kRotaryHeads * from_step;
    to += kRotaryHeads * to_step;
  }
}

// Copies the elements of a token's heads that do not rotate.
template <typename T, int kCount>
FM_DEVICE void copy_rest(const Rotary& a, const Heads& x, int64_t i0, int64_t i1) {
  using A = Access<T, (kCount > 1)>;
  const T* from = static_cast<const T*>(x.data) + i0 * x.stride0 + i1 * x.stride1 + 2 * a.half;
  T* to = static_cast<T*>(x.out) + i0 * x.out_stride0 + i1 * x.out_stride1 + 2 * a.half;
  const int rest = static_cast<int>((a.head_dim - 2 * a.half) / kCount), total = rest * static_cast<int>(x.heads);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x + 32 * blockIdx.y); i < total; i += 32 * static_cast<int>(gridDim.y)) {
    const int head = i / rest, column = (i - head * rest) * kCount;
    float values[kCount];
    A::unpack(A::load(from + head * x.stride_head + column), values);
    A::store_whole(to + head * x.out_stride_head + column, values);
  }
}

// A warp has one token, so that its angles are read once; `chunk_lanes` of its lanes share a head. If tokens are few,
// gridDim.y warps share the heads of one token.
template <typename T, int kCount, bool kInterleaved>
__global__ void __launch_bounds__(32 * kRotaryWarps, kRotaryBlocks) rotary_kernel(Rotary a, int chunk_lanes) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= a.tokens) return;
  const int64_t i0 = token / a.n1, i1 = token - i0 * a.n1;
  const int64_t position = token_position(a.where, i0, i1);
  const int head_lanes = 32 / chunk_lanes, step = head_lanes * static_cast<int>(gridDim.y);
  const int first = static_cast<int>(threadIdx.x) / chunk_lanes + static_cast<int>(blockIdx.y) * head_lanes;
  const int64_t chunks = a.half / kCount;
  for (int64_t chunk = threadIdx.x % chunk_lanes; chunk < chunks; chunk += chunk_lanes) {
    const RotaryRuns<kCount, kInterleaved> runs(a, chunk, position);
    rotate_heads<T>(a.q, i0, i1, first, step, runs);
    rotate_heads<T>(a.k, i0, i1, first, step, runs);
  }
  copy_rest<T, kCount>(a, a.q, i0, i1);
  copy_rest<T, kCount>(a, a.k, i0, i1);
}

inline bool rotary_is_wide(const Rotary& a, int64_t count) {
  const auto strides = [](const Heads& x) {
    return x.stride0 | x.stride1 | x.stride_head | x.out_stride0 | x.out_stride1 | x.out_stride_head;
  };
  const int64_t sizes = a.half | a.head_dim | strides(a.q) | strides(a.k);
  return sizes % count == 0 && a.half > 0 && is_aligned(a.q.data) && is_aligned(a.q.out) && is_aligned(a.k.data) &&
         is_aligned(a.k.out) && is_aligned(a.cos.data) && is_aligned(a.sin.data);
}

inline void launch_rotary(const Rotary& a, int multiprocessors, cudaStream_t stream) {
  const int64_t num_heads = a.q.heads + a.k.heads;
  if (a.tokens == 0 || num_heads == 0 || a.head_dim == 0) return;
  const auto launch = [&]<typename T>(T, auto count, auto interleaved) {
    const int64_t chunks = a.half / count;
    int chunk_lanes = 1;
    while (chunk_lanes < 32 && chunk_lanes < chunks) chunk_lanes *= 2;
    // Enough warps to fill every multiprocessor, while a warp keeps some heads to itself.
    const int64_t warps_per_multiprocessor = 16, most = num_heads / (kRotaryHeads * (32 / chunk_lanes));
    const int64_t wanted = warps_per_multiprocessor * multiprocessors / a.tokens;
    const int64_t splits = std::clamp<int64_t>(std::min(wanted, most), 1, 65535);
    const dim3 grid(static_cast<unsigned>((a.tokens + kRotaryWarps - 1) / kRotaryWarps),
                    static_cast<unsigned>(splits));
    auto* kernel = rotary_kernel<T, decltype(count)::value, decltype(interleaved)::value>;
    FM_LAUNCH(kernel, grid, dim3(32, kRotaryWarps), stream, a, chunk_lanes);
  };
  for_device_dtype(a.dtype, [&]<typename T>(T element) {
    constexpr int kWide = 16 / sizeof(T);
    const auto with_form = [&](auto count) {
      if (a.interleaved) {
        launch(element, count, std::true_type{});
      } else {
        launch(element, count, std::false_type{});
      }
    };
    if (rotary_is_wide(a, kWide)) {
      with_form(std::integral_constant<int, kWide>{});
    } else {
      with_form(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace fm

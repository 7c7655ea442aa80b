// CUDA kernels of the backward of query_key_norm and their launches, on plain pointers, without torch.
#pragma once

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
  return {rstd, rstd * rstd * rstd * (sums.y * scale)};
}

// Copies the gradient of the values of one token, kCount elements at a time.
template <typename T, bool kWide>
FM_DEVICE void copy_values(const QueryKeyNorm& a, int64_t i0, int64_t i1) {
  using A = Access<T, kWide>;
  const int runs = static_cast<int>(a.head_dim) / A::kCount, total = runs * static_cast<int>(a.v.heads);
  for (int i = static_cast<int>(threadIdx.x); i < total; i += 32) {
    const int head = i / runs, column = (i - head * runs) * A::kCount;
    float values[A::kCount];
    A::unpack(A::load(input_of<T>(a.v, i0, i1, head) + column), values);
    A::store_whole(output_of<T>(a.v, i0, i1, head) + column, values);
  }
}

// One head of q or k: writes dx, and adds dy x rstd to the sums of this lane's columns.
template <typename T>
FM_DEVICE void head_backward(const QueryKeyNorm& a, const Heads& heads, const Heads& inputs, const float* weight,
                             const ShareAngles<16 / sizeof(T)>& angles, const HeadShare& share, int64_t i0, int64_t i1,
                             int head, int lanes, float (&sums)[2][16 / sizeof(T)]) {
  constexpr int kCount = 16 / sizeof(T);
  const bool valid = head < static_cast<int>(heads.heads) && share.exists;
  Runs<T, true> upstream, input;
  upstream.load(input_of<T>(heads, i0, i1, head), share, valid);
  input.load(input_of<T>(inputs, i0, i1, head), share, valid);
  float g[2][kCount], x[2][kCount], w[2][kCount];
  upstream.unpack(g[0], g[1]);
  input.unpack(x[0], x[1]);
  angles.template turn<true>(share, g[0], g[1]);
  read_shared(weight + share.first, valid, w[0]);
  read_shared(weight + share.second, valid && share.has_second, w[1]);
  float2 own{squares(x[0], x[1]), 0.0f};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) own.y += g[i][j] * w[i][j] * x[i][j];
  }
  const HeadSums found = head_sums(sum_of_lanes(own, lanes), 1.0f / static_cast<float>(a.head_dim), a.eps);
  // The weights are read again: kept across the sums, they would cost a block of the four on a multiprocessor.
  read_shared(weight + opaque(share.first), valid, w[0]);
  read_shared(weight + opaque(share.second), valid && share.has_second, w[1]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float scaled = g[i][j] * found.rstd;
      sums[i][j] += scaled * x[i][j];
      x[i][j] = scaled * w[i][j] - x[i][j] * found.projection;
    }
  }
  if (valid) Runs<T, true>::store(output_of<T>(heads, i0, i1, head), share, x[0], x[1]);
}

// Adds up the lanes of a warp that have the same columns, and writes their sums for this warp.
template <int kCount>
FM_DEVICE void gather_sums(const HeadShare& share, int lanes, const float (&sums)[2][kCount], float* of_warp) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float sum = sums[i][j];
      for (int offset = 16; offset >= lanes; offset /= 2) sum = added(sum, from_lane(sum, offset));
      const bool writes = static_cast<int>(threadIdx.x) < lanes && share.exists && (i == 0 || share.has_second);
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
  const int at_once = 32 / lanes, lane_head = static_cast<int>(threadIdx.x) / lanes;
  float q_sums[2][kCount] = {}, k_sums[2][kCount] = {};
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kHeadNormWarps + threadIdx.y; token < a.tokens;
       token += static_cast<int64_t>(gridDim.x) * kHeadNormWarps) {
    const int64_t i0 = token / a.n1, i1 = token - i0 * a.n1;
    const ShareAngles<kCount> angles(a, share, i0);
    // All lanes stay in the loops: they exchange sums.
    for (int base = 0; base < static_cast<int>(a.q.heads); base += at_once) {
      head_backward<T>(a, a.q, a.q_input, weights, angles, share, i0, i1, base + lane_head, lanes, q_sums);
    }
    for (int base = 0; base < static_cast<int>(a.k.heads); base += at_once) {
      head_backward<T>(a, a.k, a.k_input, weights + a.head_dim, angles, share, i0, i1, base + lane_head, lanes, k_sums);
    }
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
__global__ void __launch_bounds__(32 * kHeadNormWarps) query_key_norm_backward_narrow_kernel(QueryKeyNorm a) {
  using Narrow = Runs<T, false>;
  FM_DYNAMIC_SHARED(float, weights);  // then the sums of the warps
  float* gathered = weights + 2 * a.head_dim;
  float* of_warp = gathered + static_cast<int64_t>(threadIdx.y) * 2 * a.head_dim;
  load_weights(a, weights);
  for (int i = static_cast<int>(threadIdx.x); i < 2 * static_cast<int>(a.head_dim); i += 32) of_warp[i] = 0.0f;
  __syncthreads();
  const int shares = static_cast<int>(a.half + (a.head_dim - 2 * a.half + 1) / 2);
  const int q_heads = static_cast<int>(a.q.heads), num_heads = q_heads + static_cast<int>(a.k.heads);
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kHeadNormWarps + threadIdx.y; token < a.tokens;
       token += static_cast<int64_t>(gridDim.x) * kHeadNormWarps) {
    const int64_t i0 = token / a.n1, i1 = token - i0 * a.n1;
    for (int head = 0; head < num_heads; ++head) {
      const bool is_q = head < q_heads;
      const Heads& heads = is_q ? a.q : a.k;
      const int own = is_q ? head : head - q_heads;
      const T* dy = input_of<T>(heads, i0, i1, own);
      const T* x_head = input_of<T>(is_q ? a.q_input : a.k_input, i0, i1, own);
      const float* weight = weights + (is_q ? 0 : a.head_dim);
      float* sums = of_warp + (is_q ? 0 : a.head_dim);
      float g[2][1], x[2][1], w[2][1];
      const auto load = [&](const HeadShare& share) {
        Narrow upstream, input;
        upstream.load(dy, share, true);
        input.load(x_head, share, true);
        upstream.unpack(g[0], g[1]);
        input.unpack(x[0], x[1]);
        ShareAngles<1>(a, share, i0).template turn<true>(share, g[0], g[1]);
        read_shared(weight + share.first, true, w[0]);
        read_shared(weight + share.second, share.has_second, w[1]);
      };
      float2 both{0.0f, 0.0f};
      for (int at = static_cast<int>(threadIdx.x); at < shares; at += 32) {
        load(HeadShare(a, at, 1));
        both = added(both, {squares(x[0], x[1]), g[0][0] * w[0][0] * x[0][0] + g[1][0] * w[1][0] * x[1][0]});
      }
      const HeadSums found = head_sums(warp_sum(both), 1.0f / static_cast<float>(a.head_dim), a.eps);
      for (int at = static_cast<int>(threadIdx.x); at < shares; at += 32) {
        const HeadShare share(a, at, 1);
        load(share);
        sums[share.first] += g[0][0] * found.rstd * x[0][0];
        if (share.has_second) sums[share.second] += g[1][0] * found.rstd * x[1][0];
        for (int i = 0; i < 2; ++i) x[i][0] = g[i][0] * found.rstd * w[i][0] - x[i][0] * found.projection;
        Narrow::store(output_of<T>(heads, i0, i1, own), share, x[0], x[1]);
      }
    }
    copy_values<T, false>(a, i0, i1);
  }
  __syncthreads();
  write_partials(a, gathered);
}

inline int64_t query_key_norm_parts(int64_t tokens, int multiprocessors) {
  const int64_t most = static_cast<int64_t>(multiprocessors) * kHeadNormBackwardBlocks;
  return std::clamp<int64_t>((tokens + kHeadNormWarps - 1) / kHeadNormWarps, 1, most);
}

// parts: of query_key_norm_parts(), for which a.partials has memory.
inline void launch_query_key_norm_backward(const QueryKeyNorm& a, int64_t parts, const MutableParameter& q_dweight,
                                           const MutableParameter& k_dweight, cudaStream_t stream) {
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

// CUDA backward of layer_norm and rms_norm, for rows that fit the registers of a block.
#pragma once

#include <type_traits>

#include "cuda/column_sums.cuh"
#include "norm/rows.cuh"

namespace fm {

// Adds the sums of all groups in order, and stores them as one row of `out`; `shared` holds a row for every group.
template <typename Rows>
FM_DEVICE void write_column_sums(const Rows& rows, const float (&sums)[Rows::kAccesses][Rows::kCount], float* shared,
                                 float* out) {
  constexpr int kCount = Rows::kCount;
  float* to = Rows::kGroups > 1 ? shared + rows.group * rows.width : out;
  if constexpr (Rows::kGroups > 1) __syncthreads();
#pragma unroll
  for (int i = 0; i < Rows::kAccesses; ++i) {
    if (!rows.holds(i)) continue;
    if constexpr (kCount == 1) {
      to[rows.column(i)] = sums[i][0];
    } else {
#pragma unroll
      for (int k = 0; k < kCount; k += 4) {
        *reinterpret_cast<float4*>(to + rows.column(i) + k) =
            float4{sums[i][k], sums[i][k + 1], sums[i][k + 2], sums[i][k + 3]};
      }
    }
  }
  if constexpr (Rows::kGroups > 1) {
    __syncthreads();
    for (int64_t column = threadIdx.x; column < rows.width; column += kNormThreads) {
      float sum = shared[column];
#pragma unroll
      for (int other = 1; other < Rows::kGroups; ++other) sum += shared[other * rows.width + column];
      out[column] = sum;
    }
  }
}

// Besides two sums a column, the registers have room for half of the weight. The shared memory has no room for the
// whole weight if rows are float32.
template <typename Rows>
using BackwardParameter = ColumnValues<Rows, (Rows::kGroups > 1 || Rows::kCount == 8) ? 0 : Rows::kAccesses / 2>;

// dy, x and dtotal are read from memory once. They wait in shared memory for the sums over their row, and are unpacked
// from there twice, since the registers hold the sums over columns. A slot that has been read takes a later row at
// once.
template <typename Dy, typename Stream, bool kCentred, int kWarps>
__global__ void __launch_bounds__(kNormThreads, 1) norm_backward_in_registers(NormBackward a, int stages) {
  using Rows = NormRows<Dy, Stream, kWarps>;
  using Sums = std::conditional_t<kCentred, float2, float>;
  constexpr int kAccesses = Rows::kAccesses, kCount = Rows::kCount;
  constexpr int kX = Dy::kSlots * kNormThreads, kTotal = kX + Stream::kSlots * kNormThreads;
  FM_DYNAMIC_SHARED(typename Rows::Slot, ring);
  FM_SHARED(Sums, scratch, 2 * kNormThreads / kWarpSize);
  const Rows rows(a.width);
  const Dy dy(a.dy, a.dtype), dx(a.dx, a.dtype);
  const Stream x(a.x, a.stream_dtype), dtotal(a.dtotal, a.stream_dtype), dresidual(a.dresidual, a.stream_dtype);
  const int accesses = static_cast<int>((a.width + Rows::kStep - 1) / Rows::kStep);
  const int slots = Dy::kSlots + Stream::kSlots + (a.dtotal != nullptr ? Stream::kSlots : 0);
  const auto slot = [&](int stage, int i) {
    return ring + (stage * accesses + i) * slots * kNormThreads + threadIdx.x;
  };
  const auto fetch = [&](int64_t row, int stage, int i) {
    if (row >= a.rows) return;
    const int64_t index = row * a.width + rows.column(i);
    dy.fetch(index, slot(stage, i), kNormThreads);
    x.fetch(index, slot(stage, i) + kX, kNormThreads);
    if (a.dtotal != nullptr) dtotal.fetch(index, slot(stage, i) + kTotal, kNormThreads);
  };
  for (int stage = 0; stage < stages; ++stage) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (rows.holds(i)) fetch(rows.row(stage), stage, i);
    }
    commit_copies();
  }
  float* staging = reinterpret_cast<float*>(ring + stages * accesses * slots * kNormThreads);
  BackwardParameter<Rows> weights;
  weights.load(rows, a.weight, 1.0f, a.weight_offset, staging);
  if constexpr (Rows::kGroups > 1) __syncthreads();
  float dweight[kAccesses][kCount] = {}, dbias[kAccesses][kCount] = {};
  const int64_t rounds = Rows::rounds(a.rows);
  int stage = 0, parity = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t row = rows.row(round);
    const bool active = row < a.rows;
    const float mean = active && kCentred ? a.mean[row] : 0.0f, rstd = active ? a.rstd[row] : 0.0f;
    float g[kCount], normalised[kCount], weight[kCount];
    Sums sums{};
    const auto unpack = [&](int i) {
      dy.unpack(Dy::take(slot(stage, i), kNormThreads), g);
      x.unpack(Stream::take(slot(stage, i) + kX, kNormThreads), normalised);
      weights.get(i, weight);
#pragma unroll
      for (int k = 0; k < kCount; ++k) normalised[k] = (kCentred ? normalised[k] - mean : normalised[k]) * rstd;
    };
    wait_for_copies(stages - 1);
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (!active || !rows.holds(i)) continue;
      unpack(i);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        dweight[i][k] += g[k] * normalised[k];
        if constexpr (kCentred) dbias[i][k] += g[k];
        g[k] *= weight[k];
        if constexpr (kCentred) {
          sums = added(sums, {g[k] * normalised[k], g[k]});
        } else {
          sums += g[k] * normalised[k];
        }
      }
    }
    sums = row_sum<kWarps>(sums, scratch + (parity * Rows::kGroups + rows.group) * kWarps, rows.warp, rows.lane);
    parity ^= 1;
    float mean_projection, mean_g = 0.0f;
    if constexpr (kCentred) {
      mean_projection = sums.x / static_cast<float>(a.width);
      mean_g = sums.y / static_cast<float>(a.width);
    } else {
      mean_projection = sums / static_cast<float>(a.width);
    }
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (!rows.holds(i)) continue;
      if (active && (a.dx != nullptr || a.dresidual != nullptr)) {
        unpack(i);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          g[k] = rstd * ((kCentred ? g[k] * weight[k] - mean_g : g[k] * weight[k]) -
                         normalised[k] * mean_projection);
        }
        if (a.dtotal != nullptr) {
          dtotal.unpack(Stream::take(slot(stage, i) + kTotal, kNormThreads), normalised);
#pragma unroll
          for (int k = 0; k < kCount; ++k) g[k] += normalised[k];
        }
        const int64_t index = row * a.width + rows.column(i);
        if (a.dx != nullptr) dx.store(index, dx.pack(g));
        if (a.dresidual != nullptr) dresidual.store(index, dresidual.pack(g));
      }
      fetch(rows.row(round + stages), stage, i);
    }
    commit_copies();
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
  if (a.partials == nullptr) return;
  wait_for_copies(0);  // the ring now holds the rows of sums of the groups
  float* partials = a.partials + static_cast<int64_t>(blockIdx.x) * (kCentred ? 2 : 1) * a.width;
  float* shared = reinterpret_cast<float*>(ring);
  write_column_sums(rows, dweight, shared, partials);
  if constexpr (kCentred) write_column_sums(rows, dbias, shared, partials + a.width);
}

// Returns false if no row fits into shared memory.
template <typename Dy, typename Stream, bool kCentred, int kWarps>
bool try_backward_in_registers(const NormBackward& a, NormDevice device, cudaStream_t stream) {
  using Rows = NormRows<Dy, Stream, kWarps>;
  const int64_t slots = Dy::kSlots + Stream::kSlots + (a.dtotal != nullptr ? Stream::kSlots : 0);
  const int64_t stage_bytes = norm_stage_bytes<Rows>(a.width, slots);
  const int64_t row_bytes = a.width * static_cast<int64_t>(sizeof(float));
  const int64_t staging_bytes = BackwardParameter<Rows>::shared_bytes(a.width);
  const int64_t stages = std::min<int64_t>(kNormMaxStages, (device.shared_bytes - staging_bytes) / stage_bytes);
  if (stages < 1) return false;
  const int64_t sums_bytes = Rows::kGroups > 1 ? Rows::kGroups * row_bytes : 0;
  const int bytes = static_cast<int>(std::max(stages * stage_bytes + staging_bytes, sums_bytes));
  auto* kernel = norm_backward_in_registers<Dy, Stream, kCentred, kWarps>;
  if (bytes > kSharedWithoutAsking) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  FM_LAUNCH_DYNAMIC(kernel, dim3(static_cast<unsigned>(a.parts)), dim3(kNormThreads), bytes, stream, a,
                    static_cast<int>(stages));
  return true;
}

template <typename Dy, typename Stream, bool kCentred>
bool try_backward(const NormBackward& a, NormDevice device, cudaStream_t stream) {
  if (a.width <= 1024) return try_backward_in_registers<Dy, Stream, kCentred, 1>(a, device, stream);
  if constexpr (Dy::kCount > 1) {  // narrow accesses are slow anyway and need no third kernel
    if (a.width <= 4096) return try_backward_in_registers<Dy, Stream, kCentred, 4>(a, device, stream);
  }
  return try_backward_in_registers<Dy, Stream, kCentred, 16>(a, device, stream);
}

}  // namespace fm

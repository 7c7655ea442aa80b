// CUDA forward of layer_norm and rms_norm, for rows that fit the registers of a block.
#pragma once

#include <type_traits>

#include "norm/rows.cuh"

namespace fm {

// If groups share a parameter, it lies in shared memory. Narrow accesses take more registers; so does a row that is
// kept in a wider dtype than it was read.
template <typename Rows, typename In, typename Stream>
using ForwardParameter = ColumnValues<
    Rows, (Rows::kGroups > 1                                             ? 0
           : Rows::kCount == 1                                           ? Rows::kAccesses / 2
           : sizeof(typename Stream::Raw) > sizeof(typename In::Raw) ? Rows::kAccesses * 3 / 4
                                                                         : Rows::kAccesses)>;

// x (and residual) are read once. The row stays in registers in its own dtype, for the mean, then for the squares of
// the centred values, then for the result.
template <typename In, typename Stream, bool kCentred, int kWarps>
__global__ void __launch_bounds__(kNormThreads, 1) norm_forward_in_registers(NormForward a, int stages) {
  using Rows = NormRows<In, Stream, kWarps>;
  constexpr int kAccesses = Rows::kAccesses, kCount = Rows::kCount;
  FM_DYNAMIC_SHARED(typename Rows::Slot, ring);
  FM_SHARED(float, scratch, 2 * kNormThreads / kWarpSize);
  const Rows rows(a.width);
  const In x(a.x, a.dtype), y(a.y, a.dtype);
  const Stream residual(a.residual, a.stream_dtype), total(a.total, a.stream_dtype);
  const bool adds = a.residual != nullptr;
  const int accesses = static_cast<int>((a.width + Rows::kStep - 1) / Rows::kStep);
  const int slots = In::kSlots + (adds ? Stream::kSlots : 0);
  const auto slot = [&](int stage, int i) {
    return ring + (stage * accesses + i) * slots * kNormThreads + threadIdx.x;
  };
  const auto fetch = [&](int64_t round, int stage) {
    const int64_t row = rows.row(round);
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (row >= a.rows || !rows.holds(i)) continue;
      const int64_t index = row * a.width + rows.column(i);
      x.fetch(index, slot(stage, i), kNormThreads);
      if (adds) residual.fetch(index, slot(stage, i) + In::kSlots * kNormThreads, kNormThreads);
    }
    commit_copies();
  };
  for (int stage = 0; stage < stages; ++stage) fetch(stage, stage);
  float* staging = reinterpret_cast<float*>(ring + stages * accesses * slots * kNormThreads);
  ForwardParameter<Rows, In, Stream> weights, biases;
  weights.load(rows, a.weight, 1.0f, a.weight_offset, staging);
  const int staged = accesses > weights.kFirst ? accesses - weights.kFirst : 0;
  if constexpr (kCentred) biases.load(rows, a.bias, 0.0f, 0.0f, staging + staged * Rows::kStep);
  if constexpr (Rows::kGroups > 1) __syncthreads();

  const int64_t rounds = Rows::rounds(a.rows);
  int stage = 0, parity = 0;
  const auto sum_of_row = [&](float value) {
    parity ^= 1;
    return row_sum<kWarps>(value, scratch + (parity * Rows::kGroups + rows.group) * kWarps, rows.warp, rows.lane);
  };
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t row = rows.row(round);
    const bool active = row < a.rows;
    typename Stream::Raw kept[kAccesses];
    float values[kCount], sum = 0.0f, mean = 0.0f;
    wait_for_copies(stages - 1);
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (!active || !rows.holds(i)) continue;
      const typename In::Raw read = In::take(slot(stage, i), kNormThreads);
      x.unpack(read, values);
      if (adds) {
        float others[kCount];
        residual.unpack(Stream::take(slot(stage, i) + In::kSlots * kNormThreads, kNormThreads), others);
#pragma unroll
        for (int k = 0; k < kCount; ++k) values[k] += others[k];
        kept[i] = total.pack(values);
        total.store(row * a.width + rows.column(i), kept[i]);
        total.unpack(kept[i], values);  // normalise the values that backward will read
      } else if constexpr (std::is_same_v<In, Stream>) {
        kept[i] = read;
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) sum += kCentred ? values[k] : values[k] * values[k];
    }
    fetch(round + stages, stage);
    stage = stage + 1 == stages ? 0 : stage + 1;
    sum = sum_of_row(sum);
    if constexpr (kCentred) {
      mean = sum / static_cast<float>(a.width);
      sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) {
        if (!active || !rows.holds(i)) continue;
        total.unpack(kept[i], values);
#pragma unroll
        for (int k = 0; k < kCount; ++k) sum += (values[k] - mean) * (values[k] - mean);
      }
      sum = sum_of_row(sum);
    }
    const float rstd = inverse_sqrt(sum / static_cast<float>(a.width) + a.eps);
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (!active || !rows.holds(i)) continue;
      float weight[kCount], bias[kCount];
      total.unpack(kept[i], values);
      weights.get(i, weight);
      if constexpr (kCentred) biases.get(i, bias);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        values[k] = kCentred ? (values[k] - mean) * rstd * weight[k] + bias[k] : values[k] * rstd * weight[k];
      }
      y.store(row * a.width + rows.column(i), y.pack(values));
    }
    if (active && rows.warp == 0 && rows.lane == 0) {
      if constexpr (kCentred) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
  }
}

// Returns false if no row fits into shared memory.
template <typename In, typename Stream, bool kCentred, int kWarps>
bool try_forward_in_registers(const NormForward& a, NormDevice device, cudaStream_t stream) {
  using Rows = NormRows<In, Stream, kWarps>;
  const int64_t slots = In::kSlots + (a.residual != nullptr ? Stream::kSlots : 0);
  const int64_t stage_bytes = norm_stage_bytes<Rows>(a.width, slots);
  const int64_t parameter_bytes = ForwardParameter<Rows, In, Stream>::shared_bytes(a.width);
  const int64_t staging_bytes = kCentred ? 2 * parameter_bytes : parameter_bytes;
  const int64_t stages = std::min<int64_t>(kNormMaxStages, (device.shared_bytes - staging_bytes) / stage_bytes);
  if (stages < 1) return false;
  auto* kernel = norm_forward_in_registers<In, Stream, kCentred, kWarps>;
  const int bytes = static_cast<int>(stages * stage_bytes + staging_bytes);
  if (bytes > kSharedWithoutAsking) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const dim3 grid(static_cast<unsigned>(norm_blocks(a.rows, device.multiprocessors)));
  FM_LAUNCH_DYNAMIC(kernel, grid, dim3(kNormThreads), bytes, stream, a, static_cast<int>(stages));
  return true;
}

template <typename In, typename Stream, bool kCentred>
bool try_forward(const NormForward& a, NormDevice device, cudaStream_t stream) {
  if (a.width <= 1024) return try_forward_in_registers<In, Stream, kCentred, 1>(a, device, stream);
  if constexpr (In::kCount > 1) {  // narrow accesses are slow anyway and need no third kernel
    if (a.width <= 4096) return try_forward_in_registers<In, Stream, kCentred, 4>(a, device, stream);
  }
  return try_forward_in_registers<In, Stream, kCentred, 16>(a, device, stream);
}

}  // namespace fm

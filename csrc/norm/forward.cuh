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
  const bool adds = opaque(static_cast<int>(a.residual != nullptr)) != 0;
  const int accesses = (rows.width + Rows::kStep - 1) / Rows::kStep;
  // The ring of x, then the ring of residual.
  constexpr int kX = In::kSlots * kNormThreads, kResidual = Stream::kSlots * kNormThreads;
  typename Rows::Slot* const ring_residual = ring + stages * accesses * kX;
  const int64_t row_step = Rows::row_step(), skip = row_step * a.width;
  const int held = rows.held();
  int64_t row = rows.row(0), index = row * a.width + rows.first;
  // Requests the row `ahead` rounds after the current one.
  const auto fetch = [&](int stage, int ahead) {
    if (row + ahead * row_step < a.rows) {
      const int64_t from = index + ahead * skip;
      const typename In::Source from_x = x.source(from);
      const typename Stream::Source from_residual = residual.source(from);
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) {
        if (!(held >> i & 1)) continue;
        x.fetch(from_x, i * Rows::kStep, ring + stage * accesses * kX + threadIdx.x + i * kX, kNormThreads);
        if (!adds) continue;
        typename Rows::Slot* const slots = ring_residual + stage * accesses * kResidual + threadIdx.x;
        residual.fetch(from_residual, i * Rows::kStep, slots + i * kResidual, kNormThreads);
      }
    }
    commit_copies();
  };
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) fetch(stage, stage);
  float* staging = reinterpret_cast<float*>(ring_residual + (adds ? stages * accesses * kResidual : 0));
  ForwardParameter<Rows, In, Stream> weights, biases;
  weights.load(rows, a.weight, 1.0f, a.weight_offset, staging);
  const int staged = accesses > weights.kFirst ? accesses - weights.kFirst : 0;
  if constexpr (kCentred) biases.load(rows, a.bias, 0.0f, 0.0f, staging + staged * Rows::kStep);
  if constexpr (Rows::kGroups > 1) __syncthreads();

  const int64_t rounds = Rows::rounds(a.rows);
  const float per_column = 1.0f / static_cast<float>(rows.width);
  int stage = 0, parity = 0;
  const auto sum_of_row = [&](float value) {
    parity ^= 1;
    return row_sum<kWarps>(value, scratch + (parity * Rows::kGroups + rows.group) * kWarps, rows.warp, rows.lane);
  };
  for (int64_t round = 0; round < rounds; ++round) {
    const bool active = row < a.rows;
    const int now = active ? held : 0;
    typename Stream::Raw kept[kAccesses];
    float values[kCount], sum = 0.0f, mean = 0.0f;
    const auto* const slots = ring + stage * accesses * kX + threadIdx.x;
    wait_for_copies(stages - 1);
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (!(now >> i & 1)) continue;
      const typename In::Raw read = In::take(slots + i * kX, kNormThreads);
      x.unpack(read, values);
      if (adds) {
        float others[kCount];
        const auto* const slots_residual = ring_residual + stage * accesses * kResidual + threadIdx.x;
        residual.unpack(Stream::take(slots_residual + i * kResidual, kNormThreads), others);
#pragma unroll
        for (int k = 0; k < kCount; ++k) values[k] += others[k];
        kept[i] = total.pack(values);
        total.store(index, i * Rows::kStep, kept[i]);
        total.unpack(kept[i], values);  // normalise the values that backward will read
      } else if constexpr (std::is_same_v<In, Stream>) {
        kept[i] = read;
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) sum += kCentred ? values[k] : values[k] * values[k];
    }
    fetch(stage, stages);
    stage = stage + 1 == stages ? 0 : stage + 1;
    sum = sum_of_row(sum);
    if constexpr (kCentred) {
      mean = sum * per_column;
      sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) {
        if (!(now >> i & 1)) continue;
        total.unpack(kept[i], values);
#pragma unroll
        for (int k = 0; k < kCount; ++k) sum += (values[k] - mean) * (values[k] - mean);
      }
      sum = sum_of_row(sum);
    }
    const float rstd = inverse_sqrt(sum * per_column + a.eps);
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (!(now >> i & 1)) continue;
      float weight[kCount], bias[kCount];
      total.unpack(kept[i], values);
      weights.get(i, weight);
      if constexpr (kCentred) biases.get(i, bias);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        values[k] = kCentred ? (values[k] - mean) * rstd * weight[k] + bias[k] : values[k] * rstd * weight[k];
      }
      y.store(index, i * Rows::kStep, y.pack(values));
    }
    if (active && rows.warp == 0 && rows.lane == 0) {
      if constexpr (kCentred) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
    row += row_step;
    index = opaque(index + skip);
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
  constexpr auto* kernel = norm_forward_in_registers<In, Stream, kCentred, kWarps>;
  const int bytes = static_cast<int>(stages * stage_bytes + staging_bytes);
  if (!allow_dynamic_shared<kernel>(bytes)) return false;
  const dim3 grid(static_cast<unsigned>(norm_blocks(a.rows, device.multiprocessors)));
  FM_LAUNCH_DYNAMIC(kernel, grid, dim3(kNormThreads), bytes, stream, a, static_cast<int>(stages));
  return true;
}

template <typename In, typename Stream, bool kCentred>
bool try_forward(const NormForward& a, NormDevice device, cudaStream_t stream) {
  if (a.width <= 1024) return try_forward_in_registers<In, Stream, kCentred, 1>(a, device, stream);
  if constexpr (In::kCount > 1) {  // narrow accesses are slow anyway and need no third kernel
    if (a.width <= 4096) return try_forward_in_registers<In, Stream, kCentred, 4>(a, device, stream);
    if (a.width <= 8192) return try_forward_in_registers<In, Stream, kCentred, 8>(a, device, stream);
  }
  return try_forward_in_registers<In, Stream, kCentred, 16>(a, device, stream);
}

}  // namespace fm

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

// Besides two sums a column, the registers have room for half of the weight (narrow accesses: one column less). The
// shared memory has no room for the whole weight if rows are float32.
template <typename Rows>
using BackwardParameter =
    ColumnValues<Rows, (Rows::kGroups > 1 || Rows::kCount == 8) ? 0 : Rows::kAccesses / 2 - (Rows::kCount == 1)>;

// What a backward does, in bits.
inline constexpr int kWritesDx = 1, kWritesDresidual = 2, kAdds = 4;
FM_DEVICE int backward_flags(const NormBackward& a) {
  return opaque((a.dx != nullptr ? kWritesDx : 0) | (a.dresidual != nullptr ? kWritesDresidual : 0) |
                (a.dtotal != nullptr ? kAdds : 0));
}

// dx = rstd * (g - mean(g) - normalised * mean(g * normalised)) = rstd * g + (x * slope + base), from the sums of
// g * normalised and of g; normalised = x * rstd + shift. An rms_norm has neither mean(g) nor shift.
struct BackwardLine {
  float slope, base;
};
FM_DEVICE BackwardLine backward_line(float2 sums, float rstd, float shift, float per_column) {
  const float scaled = rstd * (sums.x * per_column);
  return {-rstd * scaled, -rstd * (sums.y * per_column) - shift * scaled};
}
FM_DEVICE BackwardLine backward_line(float sum, float rstd, float, float per_column) {
  return {-rstd * (rstd * (sum * per_column)), 0.0f};
}

// dy, x and dtotal are read from memory once. They wait in shared memory for the sums over their row, and are unpacked
// from there twice, since the registers hold the sums over columns. A slot that has been read takes a later row at
// once.
template <typename Dy, typename Stream, bool kCentred, int kWarps>
__global__ void __launch_bounds__(kNormThreads, 1) norm_backward_in_registers(NormBackward a, int stages) {
  using Rows = NormRows<Dy, Stream, kWarps>;
  using Sums = std::conditional_t<kCentred, float2, float>;
  constexpr int kAccesses = Rows::kAccesses, kCount = Rows::kCount;
  constexpr int kDy = Dy::kSlots * kNormThreads, kX = Stream::kSlots * kNormThreads;
  FM_DYNAMIC_SHARED(typename Rows::Slot, ring);
  FM_SHARED(Sums, scratch, 2 * kNormThreads / kWarpSize);
  const Rows rows(a.width);
  const Dy dy(a.dy, a.dtype), dx(a.dx, a.dtype);
  const Stream x(a.x, a.stream_dtype), dtotal(a.dtotal, a.stream_dtype), dresidual(a.dresidual, a.stream_dtype);
  const int accesses = (rows.width + Rows::kStep - 1) / Rows::kStep;
  const int held = rows.held(), flags = backward_flags(a);  // conditions of every access, kept in registers
  // The ring of dy, then of x, then of dtotal.
  typename Rows::Slot* const ring_x = ring + stages * accesses * kDy;
  typename Rows::Slot* const ring_total = ring_x + stages * accesses * kX;
  const int64_t row_step = Rows::row_step(), skip = row_step * a.width;
  int64_t row = rows.row(0), index = row * a.width + rows.first;
  const auto fetch = [&](typename Dy::Source from_dy, typename Stream::Source from_x, int64_t from, int stage, int i) {
    dy.fetch(from_dy, i * Rows::kStep, ring + stage * accesses * kDy + threadIdx.x + i * kDy, kNormThreads);
    const int slot_x = stage * accesses * kX + threadIdx.x + i * kX;
    x.fetch(from_x, i * Rows::kStep, ring_x + slot_x, kNormThreads);
    if (flags & kAdds) dtotal.fetch(dtotal.source(from), i * Rows::kStep, ring_total + slot_x, kNormThreads);
  };
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    const int64_t from = index + stage * skip;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (row + stage * row_step < a.rows && rows.holds(i)) fetch(dy.source(from), x.source(from), from, stage, i);
    }
    commit_copies();
  }
  float* staging = reinterpret_cast<float*>(ring_total + (flags & kAdds ? stages * accesses * kX : 0));
  BackwardParameter<Rows> weights;
  weights.load(rows, a.weight, 1.0f, a.weight_offset, staging);
  if constexpr (Rows::kGroups > 1) __syncthreads();
  float dweight[kAccesses][kCount] = {}, dbias[kAccesses][kCount] = {};
  const int64_t rounds = Rows::rounds(a.rows);
  const float per_column = 1.0f / static_cast<float>(rows.width);
  int stage = 0, parity = 0;
  // The statistics of a row are loaded a round before their use, where registers are left for them.
  constexpr bool kAhead = Rows::kCount == 8;
  float next_mean = 0.0f, next_rstd = 0.0f;
  const auto load_statistics = [&](int64_t of_row) {
    if (of_row >= a.rows) return;
    if constexpr (kCentred) next_mean = a.mean[of_row];
    next_rstd = a.rstd[of_row];
  };
  if constexpr (kAhead) load_statistics(row);
  for (int64_t round = 0; round < rounds; ++round) {
    const bool active = row < a.rows;
    const int now = active ? held : 0;
    if constexpr (!kAhead) load_statistics(row);
    const float mean = next_mean, rstd = next_rstd;
    if constexpr (kAhead) load_statistics(row + row_step);
    const auto* const slots_dy = ring + stage * accesses * kDy + threadIdx.x;
    const int slot_x = stage * accesses * kX + threadIdx.x;
    float g[kCount], values[kCount], weight[kCount];
    Sums sums{};
    const auto unpack = [&](int i) {
      dy.unpack(Dy::take(slots_dy + i * kDy, kNormThreads), g);
      x.unpack(Stream::take(ring_x + slot_x + i * kX, kNormThreads), values);
      weights.get(i, weight);
    };
    const float shift = -mean * rstd;  // normalised = x * rstd + shift
    wait_for_copies(stages - 1);
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (!(now >> i & 1)) continue;
      unpack(i);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const float normalised = kCentred ? values[k] * rstd + shift : values[k] * rstd;
        dweight[i][k] += g[k] * normalised;
        if constexpr (kCentred) dbias[i][k] += g[k];
        g[k] *= weight[k];
        if constexpr (kCentred) {
          sums = added(sums, {g[k] * normalised, g[k]});
        } else {
          sums += g[k] * normalised;
        }
      }
    }
    sums = row_sum<kWarps>(sums, scratch + (parity * Rows::kGroups + rows.group) * kWarps, rows.warp, rows.lane);
    parity ^= 1;
    const auto [slope, base] = backward_line(sums, rstd, shift, per_column);
    const int later = row + stages * row_step < a.rows ? held : 0;  // accesses of the row that takes the slots
    const int64_t from = index + stages * skip;
    const typename Dy::Source from_dy = dy.source(from);
    const typename Stream::Source from_x = x.source(from);
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (now >> i & 1 && flags & (kWritesDx | kWritesDresidual)) {
        unpack(i);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          g[k] = rstd * (g[k] * weight[k]) + (kCentred ? values[k] * slope + base : values[k] * slope);
        }
        if (flags & kAdds) {
          dtotal.unpack(Stream::take(ring_total + slot_x + i * kX, kNormThreads), values);
#pragma unroll
          for (int k = 0; k < kCount; ++k) g[k] += values[k];
        }
        if (flags & kWritesDx) dx.store(index, i * Rows::kStep, dx.pack(g));
        if (flags & kWritesDresidual) dresidual.store(index, i * Rows::kStep, dresidual.pack(g));
      }
      if (later >> i & 1) fetch(from_dy, from_x, from, stage, i);
    }
    commit_copies();
    row += row_step;
    index = opaque(index + skip);
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
  constexpr auto* kernel = norm_backward_in_registers<Dy, Stream, kCentred, kWarps>;
  if (!allow_dynamic_shared<kernel>(bytes)) return false;
  FM_LAUNCH_DYNAMIC(kernel, dim3(static_cast<unsigned>(a.parts)), dim3(kNormThreads), bytes, stream, a,
                    static_cast<int>(stages));
  return true;
}

template <typename Dy, typename Stream, bool kCentred>
bool try_backward(const NormBackward& a, NormDevice device, cudaStream_t stream) {
  if (a.width <= 1024) return try_backward_in_registers<Dy, Stream, kCentred, 1>(a, device, stream);
  if constexpr (Dy::kCount > 1) {  // narrow accesses are slow anyway and need no third kernel
    if (a.width <= 4096) return try_backward_in_registers<Dy, Stream, kCentred, 4>(a, device, stream);
    if (a.width <= 8192) return try_backward_in_registers<Dy, Stream, kCentred, 8>(a, device, stream);
  }
  return try_backward_in_registers<Dy, Stream, kCentred, 16>(a, device, stream);
}

}  // namespace fm

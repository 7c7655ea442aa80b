// CUDA norms of rows that do not fit the registers of a block.
//
// Rows are read several times, after the first from the caches. Any dtype and address; kCount is 4 for aligned rows,
// else 1.
#pragma once

#include "norm/rows.cuh"

namespace fm {

template <int kCount>
FM_DEVICE void store_any(void* data, DType dtype, int64_t index, const float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    const AnyStream stream(data, dtype);
    stream.store(index, 0, stream.pack(values));
  } else if (dtype == DType::kFloat32) {
    *reinterpret_cast<float4*>(static_cast<float*>(data) + index) = float4{values[0], values[1], values[2], values[3]};
  } else {
    const bool is_bfloat16 = dtype == DType::kBFloat16;
    const auto pair = [&](float low, float high) {
      return is_bfloat16 ? pack_pair<BFloat16>(low, high) : pack_pair<Float16>(low, high);
    };
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + index) =
        uint2{pair(values[0], values[1]), pair(values[2], values[3])};
  }
}

template <bool kCentred, int kCount>
__global__ void __launch_bounds__(kNormThreads, 1) norm_forward_looped(NormForward a) {
  constexpr int kWarps = kNormThreads / kWarpSize, kStep = kNormThreads * kCount;
  FM_SHARED(float, scratch, 2 * kWarps);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, first = threadIdx.x * kCount;
  const ConstParameter x{a.x, a.dtype}, residual{a.residual, a.stream_dtype};
  const ConstParameter normalised = a.residual == nullptr ? x : ConstParameter{a.total, a.stream_dtype};
  const AnyStream total(a.total, a.stream_dtype);
  int parity = 0;
  const auto sum_of_row = [&](float value) {
    parity ^= 1;
    return row_sum<kWarps>(value, scratch + parity * kWarps, warp, lane);
  };
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t at = row * a.width;
    float values[kCount], sum = 0.0f, mean = 0.0f;
    for (int64_t column = first; column < a.width; column += kStep) {
      load_parameter(x, at + column, 0.0f, values);
      if (a.residual != nullptr) {
        float others[kCount];
        load_parameter(residual, at + column, 0.0f, others);
#pragma unroll
        for (int k = 0; k < kCount; ++k) values[k] = total.pack({values[k] + others[k]}).value;
        store_any(a.total, a.stream_dtype, at + column, values);
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) sum += kCentred ? values[k] : values[k] * values[k];
    }
    sum = sum_of_row(sum);
    if constexpr (kCentred) {
      mean = sum / static_cast<float>(a.width);
      sum = 0.0f;
      for (int64_t column = first; column < a.width; column += kStep) {
        load_parameter(normalised, at + column, 0.0f, values);
#pragma unroll
        for (int k = 0; k < kCount; ++k) sum += (values[k] - mean) * (values[k] - mean);
      }
      sum = sum_of_row(sum);
    }
    const float rstd = inverse_sqrt(sum / static_cast<float>(a.width) + a.eps);
    for (int64_t column = first; column < a.width; column += kStep) {
      float weight[kCount], bias[kCount];
      load_parameter(normalised, at + column, 0.0f, values);
      load_parameter(a.weight, column, 1.0f, weight);
      load_parameter(a.bias, column, 0.0f, bias);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        values[k] = (kCentred ? values[k] - mean : values[k]) * rstd * (weight[k] + a.weight_offset);
        if constexpr (kCentred) values[k] += bias[k];
      }
      store_any(a.y, a.dtype, at + column, values);
    }
    if (threadIdx.x == 0) {
      if constexpr (kCentred) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
  }
}

template <bool kCentred, int kCount>
__global__ void __launch_bounds__(kNormThreads, 1) norm_dx_looped(NormBackward a) {
  constexpr int kWarps = kNormThreads / kWarpSize, kStep = kNormThreads * kCount;
  FM_SHARED(float2, scratch, 2 * kWarps);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, first = threadIdx.x * kCount;
  const ConstParameter dy{a.dy, a.dtype}, x{a.x, a.stream_dtype}, dtotal{a.dtotal, a.stream_dtype};
  int parity = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t at = row * a.width;
    const float mean = kCentred ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    float g[kCount], normalised[kCount], others[kCount];
    const auto load = [&](int64_t column) {
      load_parameter(dy, at + column, 0.0f, g);
      load_parameter(x, at + column, 0.0f, normalised);
      load_parameter(a.weight, column, 1.0f, others);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        g[k] *= others[k] + a.weight_offset;
        normalised[k] = (kCentred ? normalised[k] - mean : normalised[k]) * rstd;
      }
    };
    float2 sums{0.0f, 0.0f};
    for (int64_t column = first; column < a.width; column += kStep) {
      load(column);
#pragma unroll
      for (int k = 0; k < kCount; ++k) sums = added(sums, {g[k] * normalised[k], g[k]});
    }
    sums = row_sum<kWarps>(sums, scratch + parity * kWarps, warp, lane);
    parity ^= 1;
    const float mean_projection = sums.x / static_cast<float>(a.width);
    const float mean_g = kCentred ? sums.y / static_cast<float>(a.width) : 0.0f;
    for (int64_t column = first; column < a.width; column += kStep) {
      load(column);
      load_parameter(dtotal, at + column, 0.0f, others);
#pragma unroll
      for (int k = 0; k < kCount; ++k) g[k] = rstd * (g[k] - mean_g - normalised[k] * mean_projection) + others[k];
      if (a.dx != nullptr) store_any(a.dx, a.dtype, at + column, g);
      if (a.dresidual != nullptr) store_any(a.dresidual, a.stream_dtype, at + column, g);
    }
  }
}

// dweight and dbias, which norm_dx_looped leaves out: one thread for a column, one blockIdx.y for a range of rows.
template <bool kCentred>
__global__ void __launch_bounds__(256) norm_column_partials(NormBackward a) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (column >= a.width) return;
  const AnyStream dy(a.dy, a.dtype), x(a.x, a.stream_dtype);
  const int64_t begin = a.rows * blockIdx.y / gridDim.y, end = a.rows * (blockIdx.y + 1) / gridDim.y;
  float dweight = 0.0f, dbias = 0.0f;
#pragma unroll 4
  for (int64_t row = begin; row < end; ++row) {
    const float g = dy.load(row * a.width + column), value = x.load(row * a.width + column);
    dweight += g * ((kCentred ? value - a.mean[row] : value) * a.rstd[row]);
    dbias += g;
  }
  float* partials = a.partials + static_cast<int64_t>(blockIdx.y) * (kCentred ? 2 : 1) * a.width + column;
  partials[0] = dweight;
  if constexpr (kCentred) partials[a.width] = dbias;
}

template <bool kCentred>
void launch_forward_looped(const NormForward& a, bool wide, NormDevice device, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(norm_blocks(a.rows, 2 * device.multiprocessors)));
  auto* kernel = wide ? norm_forward_looped<kCentred, 4> : norm_forward_looped<kCentred, 1>;
  FM_LAUNCH(kernel, grid, dim3(kNormThreads), stream, a);
}

template <bool kCentred>
void launch_backward_looped(const NormBackward& a, bool wide, NormDevice device, cudaStream_t stream) {
  if (a.dx != nullptr || a.dresidual != nullptr) {
    const dim3 grid(static_cast<unsigned>(norm_blocks(a.rows, 2 * device.multiprocessors)));
    auto* kernel = wide ? norm_dx_looped<kCentred, 4> : norm_dx_looped<kCentred, 1>;
    FM_LAUNCH(kernel, grid, dim3(kNormThreads), stream, a);
  }
  if (a.partials != nullptr) {
    const dim3 grid(static_cast<unsigned>((a.width + 255) / 256), static_cast<unsigned>(a.parts));
    auto* kernel = norm_column_partials<kCentred>;
    FM_LAUNCH(kernel, grid, dim3(256), stream, a);
  }
}

}  // namespace fm

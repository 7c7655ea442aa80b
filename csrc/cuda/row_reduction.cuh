// Sums over the threads of one row, in a fixed order; every thread of the row gets the result.
#pragma once

#include <type_traits>

#include "cuda/launch.h"

namespace fm {

inline constexpr int kWarpSize = 32;

FM_DEVICE float added(float a, float b) { return a + b; }
FM_DEVICE double added(double a, double b) { return a + b; }
FM_DEVICE float2 added(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
FM_DEVICE float from_lane(float value, int offset) { return __shfl_xor_sync(0xFFFFFFFFu, value, offset); }
FM_DEVICE double from_lane(double value, int offset) { return __shfl_xor_sync(0xFFFFFFFFu, value, offset); }
FM_DEVICE float2 from_lane(float2 value, int offset) {
  return {from_lane(value.x, offset), from_lane(value.y, offset)};
}

// Value: float, double or float2.
template <typename Value>
FM_DEVICE Value warp_sum(Value value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value = added(value, from_lane(value, offset));
  return value;
}

// The sum of kCount values in shared memory, in order, read 16 bytes at a time.
template <int kCount>
FM_DEVICE float sum_of_quads(const float* scratch) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(scratch + i);
    sum = (i == 0 ? four.x : sum + four.x) + four.y + four.z + four.w;
  }
  return sum;
}
template <int kCount>
FM_DEVICE float2 sum_of_quads(const float2* scratch) {
  float2 sum{0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const float4 two = *reinterpret_cast<const float4*>(scratch + i);
    sum = i == 0 ? float2{two.x, two.y} : added(sum, float2{two.x, two.y});
    sum = added(sum, float2{two.z, two.w});
  }
  return sum;
}

// kWarps warps share a row. `scratch` holds kWarps values of this row in shared memory, at a multiple of 16 bytes. Two
// consecutive calls must not use the same scratch, since there is only one barrier between write and read. If
// kWarps > 1, every thread of the block must call this.
template <int kWarps, typename Value>
FM_DEVICE Value row_sum(Value value, Value* scratch, int warp_of_row, int lane) {
  value = warp_sum(value);
  if constexpr (kWarps > 1) {
    if (lane == 0) scratch[warp_of_row] = value;
    __syncthreads();
    if constexpr (!std::is_same_v<Value, double>) {
      value = sum_of_quads<kWarps>(scratch);
    } else {
      value = scratch[0];
#pragma unroll
      for (int i = 1; i < kWarps; ++i) value = added(value, scratch[i]);
    }
  }
  return value;
}

}  // namespace fm

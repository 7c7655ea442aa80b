// Sums over the threads of one row, in a fixed order; every thread of the row gets the result.
#pragma once

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

// kWarps warps share a row. `scratch` holds kWarps values of this row in shared memory. Two consecutive calls must not
// use the same scratch, since there is only one barrier between write and read. If kWarps > 1, every thread of the
// block must call this.
template <int kWarps, typename Value>
FM_DEVICE Value row_sum(Value value, Value* scratch, int warp_of_row, int lane) {
  value = warp_sum(value);
  if constexpr (kWarps > 1) {
    if (lane == 0) scratch[warp_of_row] = value;
    __syncthreads();
    value = scratch[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) value = added(value, scratch[i]);
  }
  return value;
}

}  // namespace fm

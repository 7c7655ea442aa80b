#pragma once

#include "launch.h"

// Sums over the threads of one row, in a fixed order, known to every thread of the row afterwards.
namespace fm {

inline constexpr int kWarpSize = 32;

FM_DEVICE float2 warp_sum(float2 value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value.x += __shfl_xor_sync(0xFFFFFFFFu, value.x, offset);
    value.y += __shfl_xor_sync(0xFFFFFFFFu, value.y, offset);
  }
  return value;
}

// kWarps warps share a row. `scratch` holds kWarps values of this row in shared memory; two calls in a row must not
// use the same scratch, since only one barrier separates its writing from its reading. Every thread of the block must
// call this when kWarps > 1.
template <int kWarps>
FM_DEVICE float2 row_sum(float2 value, float2* scratch, int warp_of_row, int lane) {
  value = warp_sum(value);
  if constexpr (kWarps > 1) {
    if (lane == 0) scratch[warp_of_row] = value;
    __syncthreads();
    value = scratch[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) {
      value.x += scratch[i].x;
      value.y += scratch[i].y;
    }
  }
  return value;
}

}  // namespace fm

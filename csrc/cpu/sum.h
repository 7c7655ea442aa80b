// Sums along a row, in an order of additions that is the same for every vector width.
#pragma once

#include <cstdint>

#include "cpu/multiversion.h"

namespace fm {

// The sums over j in [0, n) of the kSums values that add(j, sums, stride) adds to sums[0], sums[stride], ...
// 64 lanes are summed separately: four independent vectors of the largest width, so that an addition need not wait for
// the previous one. The order of additions is the same for every vector width.
inline constexpr int kSumLanes = 64;

template <int kSums, typename Add>
FM_INLINE void lane_sums(int64_t n, float (&sums)[kSums], const Add& add) {
  float lanes[kSums][kSumLanes] = {};
  int64_t j = 0;
  for (; j + kSumLanes <= n; j += kSumLanes) {
#pragma omp simd
    for (int lane = 0; lane < kSumLanes; ++lane) add(j + lane, &lanes[0][lane]);
  }
#pragma omp simd
  for (int lane = 0; lane < static_cast<int>(n - j); ++lane) add(j + lane, &lanes[0][lane]);
  for (int k = 0; k < kSums; ++k) {
    for (int half = kSumLanes / 2; half > 0; half /= 2) {
#pragma omp simd
      for (int lane = 0; lane < half; ++lane) lanes[k][lane] += lanes[k][lane + half];
    }
    sums[k] = lanes[k][0];
  }
}

}  // namespace fm

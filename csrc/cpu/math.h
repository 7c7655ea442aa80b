// Elementary functions without branches or calls, so that loops over them vectorise.
#pragma once

#include <bit>
#include <cstdint>

#include "cpu/multiversion.h"

namespace fm {

// exp(x) to about 1 ulp; overflows to inf, underflows gradually to 0, keeps NaN.
FM_INLINE float exp_vectorised(float x) {
  x = x > 104.0f ? 104.0f : x;  // comparisons are false for NaN, so it passes through
  x = x < -104.0f ? -104.0f : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  // ln 2 in two parts: the high part has few enough bits that n * high is exact.
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  // Minimax polynomial of (exp(r) - 1 - r) / r^2 on [-ln 2 / 2, ln 2 / 2].
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^exponent in two factors: a single factor would overflow before the product does.
  const int32_t half = exponent >> 1;
  const float first = std::bit_cast<float>((half + 127) << 23);
  const float second = std::bit_cast<float>((exponent - half + 127) << 23);
  return p * first * second;
}

// exp(x) in two thirds of the time, for results that are normal numbers. The error is 2 ulp near 0 (and x / 2^24
// relative if the processor has no fused multiply-add). Below -87.33, where results would be subnormal, it is exactly
// 0, so that exp(-inf) is 0. Above 88.72 the result is infinite, NaN or negative: callers that may reach it must check.
// NaN stays NaN.
FM_INLINE float exp_of_normal(float x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kRound = 12582912.0f;  // as above
  const float shifted = x * kLog2E + kRound;
  const float fraction = x * kLog2E - (shifted - kRound);
  // 2^fraction: the polynomial with p(0) = 1 of least maximal relative error (2^-29) on [-1/2, 1/2].
  float p = 0.00015353362f;
  p = p * fraction + 0.0013398875f;
  p = p * fraction + 0.00961843692f;
  p = p * fraction + 0.0555033237f;
  p = p * fraction + 0.240226477f;
  p = p * fraction + 0.693147182f;
  p = p * fraction + 1.0f;
  // An exponent of 128 stands for infinity. Integers, so that compilers recognise a minimum; NaN counts as large.
  constexpr int32_t kLargest = std::bit_cast<int32_t>(kRound) + 128;
  const int32_t bits = std::bit_cast<int32_t>(shifted);
  const int32_t exponent = bits < kLargest ? bits : kLargest;
  const float power = std::bit_cast<float>((static_cast<uint32_t>(exponent) << 23) + (127u << 23));
  return x < -87.33f ? 0.0f : p * power;
}

}  // namespace fm

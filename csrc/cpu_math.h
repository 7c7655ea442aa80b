#pragma once

#include <bit>
#include <cstdint>

#include "multiversion.h"

// Elementary functions without branches or calls, so that loops over them vectorise.
namespace fm {

// exp(x) to about 1 ulp; overflows to inf, underflows gradually to 0, keeps NaN.
FM_INLINE float exp_vectorised(float x) {
  x = x > 104.0f ? 104.0f : x;  // comparisons are false for NaN, which so passes through
  x = x < -104.0f ? -104.0f : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  // ln 2 in two parts: the high one has so few bits that n * high is exact.
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
  // 2^exponent in two factors: one alone would overflow before the product does.
  const int32_t half = exponent >> 1;
  const float first = std::bit_cast<float>((half + 127) << 23);
  const float second = std::bit_cast<float>((exponent - half + 127) << 23);
  return p * first * second;
}

}  // namespace fm

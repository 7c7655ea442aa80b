#pragma once

// Scalar functions that compilers turn into vector code: no branches, no calls, no tables.

#include <bit>
#include <cstdint>
#include <limits>

#include "multiversion.h"

namespace fused_megatron {

// e^x to 2 ulp near 0 (and x / 2^24 relative where the processor has no fused multiply-add). Below -87.33 (results that
// would be subnormal) exactly 0, so that e^-inf is 0; above 88.72 no finite positive number (infinite, NaN or negative:
// callers that may come there must look); NaN stays NaN.
FM_INLINE float vector_exp(float x) {
  constexpr float kLog2E = 1.44269504f;
  // Adding 1.5 * 2^23 leaves round(x log2(e)) in the low bits of the sum.
  constexpr float kRounder = 12582912.0f;
  const float rounded = x * kLog2E + kRounder;
  const float fraction = x * kLog2E - (rounded - kRounder);
  // 2^fraction, by the polynomial of least maximal relative error (2^-29) on [-1/2, 1/2] with p(0) = 1.
  float p = 0.00015353362f;
  p = p * fraction + 0.0013398875f;
  p = p * fraction + 0.00961843692f;
  p = p * fraction + 0.0555033237f;
  p = p * fraction + 0.240226477f;
  p = p * fraction + 0.693147182f;
  p = p * fraction + 1.0f;
  // An exponent of 128 stands for infinity. As integers, so that compilers see a minimum; NaN counts as large.
  constexpr int32_t kLargest = std::bit_cast<int32_t>(kRounder) + 128;
  const int32_t bits = std::bit_cast<int32_t>(rounded);
  const int32_t exponent = bits < kLargest ? bits : kLargest;
  const float power = std::bit_cast<float>((static_cast<uint32_t>(exponent) << 23) + (127u << 23));
  return x < -87.33f ? 0.0f : p * power;
}

// 16-bit floats as their bits. The conversions are integer work, so that they vectorise on every processor.
struct BFloat16Bits {
  uint16_t bits;
};
struct Float16Bits {
  uint16_t bits;
};

FM_INLINE float to_float(float x) { return x; }

FM_INLINE float to_float(BFloat16Bits x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

FM_INLINE float to_float(Float16Bits x) {
  const uint32_t magnitude = (uint32_t{x.bits} & 0x7fffu) << 13;
  // The product mends the exponent's bias, and makes subnormals normal; an exponent of ones stays one of ones.
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t finite_or_not = magnitude >= 0x0f800000u ? special : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(finite_or_not | (uint32_t{x.bits} & 0x8000u) << 16);
}

// Round to nearest, ties to even; NaN stays (a quiet) NaN.
FM_INLINE void round_to(float x, float& result) { result = x; }

FM_INLINE void round_to(float x, BFloat16Bits& result) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  result.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

FM_INLINE void round_to(float x, Float16Bits& result) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 lines the mantissa up with fp16's subnormals, and the addition rounds.
  const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
  const uint32_t subnormal = std::bit_cast<uint32_t>(shifted) - (126u << 23);
  const uint32_t overflowed = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t half = magnitude >= 0x477ff000u ? overflowed : finite;
  result.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

}  // namespace fused_megatron

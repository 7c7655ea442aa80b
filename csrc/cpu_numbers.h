#pragma once

#include <bit>
#include <cstdint>

#include "multiversion.h"

// 16-bit floats on the CPU, converted with integer operations that every x86-64 level vectorises.
namespace fm {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FM_INLINE float to_float(float value) { return value; }

FM_INLINE float to_float(BFloat16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

FM_INLINE float to_float(Float16 value) {
  const uint32_t magnitude = (value.bits & 0x7FFFu) << 13;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  // Shifted into place, the exponent is too small by 112. One exact product mends it, subnormals included;
  // inf and NaN (all exponent bits set) need the exponent of float32's own.
  const float scaled = std::bit_cast<float>(magnitude) * 0x1.0p112f;
  const uint32_t special = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

template <typename T>
T from_float(float value);

template <>
FM_INLINE float from_float<float>(float value) {
  return value;
}

template <>
FM_INLINE BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded)};
}

template <>
FM_INLINE Float16 from_float<Float16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  // Normal results: round the 13 dropped bits to nearest even, then move the exponent by 112.
  const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // Subnormal results (below 2^-14): adding 0.5 makes the hardware round at 2^-24, their last bit.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477FF000u ? 0x7C00u : result;  // 65520 and above round to inf
  result = magnitude > 0x7F800000u ? 0x7E00u : result;   // NaN
  return {static_cast<uint16_t>(result | sign)};
}

}  // namespace fm

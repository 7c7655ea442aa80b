// 16-bit floats on the CPU: their conversions to and from float32.
//
// Conversions are exact for every value (subnormals, inf, NaN) and the same, bit for bit, on every processor. They use
// only integer and float32 operations, and never a subnormal float32 (slow). Compilers vectorise them for every level;
// GCC before 13 does not vectorise the processors' own fp16 instructions. All work is in 32 bits up to one last shift:
// otherwise GCC does parts of it in 16 bits, with more shuffling than work.
#pragma once

#include <bit>
#include <cstdint>

#include "cpu/multiversion.h"

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
  const uint32_t extended = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(value.bits)));
  const int32_t magnitude = static_cast<int32_t>((extended << 13) & 0x0FFFE000u);
  // Normal numbers: the exponent moves by 112. Subnormal numbers have no leading 1, and the exponent of the next: with
  // it they are too large by 2^-14. Both results are computed for all numbers; the right one is always the smaller one.
  const int32_t normal = magnitude + (112 << 23);
  const int32_t subnormal = std::bit_cast<int32_t>(std::bit_cast<float>(normal + (1 << 23)) - 0x1p-14f);
  const int32_t finite = normal < subnormal ? normal : subnormal;
  const uint32_t special = magnitude > 0x0F7FFFFF ? 0x7F800000u : 0u;  // inf and NaN: all exponent bits set
  return std::bit_cast<float>(static_cast<uint32_t>(finite) | special | (extended & 0x80000000u));
}

// To nearest, ties to even; NaN becomes a quiet NaN.
template <typename T>
T from_float(float value);

template <>
FM_INLINE float from_float<float>(float value) {
  return value;
}

template <>
FM_INLINE BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>((value != value ? bits | 0x400000u : rounded) >> 16)};
}

template <>
FM_INLINE Float16 from_float<Float16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7FFFFFFFu);
  const int32_t clamped = magnitude < 0x47800000 ? magnitude : 0x47800000;  // 2^16, which is inf
  int32_t exponent = clamped & 0x7F800000;
  exponent = exponent > 0x38800000 ? exponent : 0x38800000;  // 2^-14: below it, the last bit keeps its value
  // Adding 2^13 times its own power of two rounds a number to 10 mantissa bits, and leaves them in the lowest bits.
  const float aligned = std::bit_cast<float>(clamped) + std::bit_cast<float>(exponent + (13 << 23));
  const uint32_t mantissa = std::bit_cast<uint32_t>(aligned) - static_cast<uint32_t>(exponent) - (13u << 23);
  const uint32_t finite = mantissa + (static_cast<uint32_t>(exponent) >> 13) - (113u << 10);
  const uint32_t half = magnitude > 0x7F800000 ? 0x7E00u : finite;
  return {static_cast<uint16_t>((half << 16 | (bits & 0x80000000u)) >> 16)};
}

}  // namespace fm

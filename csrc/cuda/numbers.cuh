// Numbers in kernels: 16-bit floats as bits, their conversions, and the functions that have a fast hardware form.
//
// Conversions are hardware instructions on the GPU; the emulation uses the conversions of the CPU kernels.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

#ifdef FM_EMULATION
#include <cmath>

#include "cpu/numbers.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fm {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A tensor whose dtype the kernel looks up at run time. Parameters are read so rarely that this branch, which all
// threads take the same way, costs less than a kernel for every combination of dtypes.
struct ConstParameter {
  const void* data;
  DType dtype;
};
struct MutableParameter {
  void* data;
  DType dtype;
};

#ifdef FM_EMULATION

FM_DEVICE float word_to_float(uint32_t word) { return std::bit_cast<float>(word); }
FM_DEVICE uint32_t float_to_word(float value) { return std::bit_cast<uint32_t>(value); }
FM_DEVICE float fast_exp(float x) { return std::exp(x); }
FM_DEVICE float fast_exp2(float x) { return std::exp2(x); }
FM_DEVICE float fast_reciprocal(float x) { return 1.0f / x; }
FM_DEVICE float inverse_sqrt(float x) { return 1.0f / std::sqrt(x); }

template <typename T>
FM_DEVICE void unpack_pair(uint32_t word, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(word)});
  high = to_float(T{static_cast<uint16_t>(word >> 16)});
}
template <typename T>
FM_DEVICE uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

#else

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FM_DEVICE float word_to_float(uint32_t word) { return __uint_as_float(word); }
FM_DEVICE uint32_t float_to_word(float value) { return __float_as_uint(value); }
FM_DEVICE float fast_exp(float x) { return __expf(x); }
FM_DEVICE float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// For x whose reciprocal is a normal number: the division of CUDA has more instructions, for the others.
FM_DEVICE float fast_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
FM_DEVICE float inverse_sqrt(float x) { return rsqrtf(x); }

FM_DEVICE float to_float(float value) { return value; }
FM_DEVICE float to_float(BFloat16 value) { return word_to_float(static_cast<uint32_t>(value.bits) << 16); }
FM_DEVICE float to_float(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

template <typename T>
FM_DEVICE T from_float(float value);
template <>
FM_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
FM_DEVICE BFloat16 from_float<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
FM_DEVICE Float16 from_float<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

template <typename T>
FM_DEVICE void unpack_pair(uint32_t word, float& low, float& high);
template <>
FM_DEVICE void unpack_pair<BFloat16>(uint32_t word, float& low, float& high) {
  low = word_to_float(word << 16);
  high = word_to_float(word & 0xFFFF0000u);
}
template <>
FM_DEVICE void unpack_pair<Float16>(uint32_t word, float& low, float& high) {
  low = __half2float(__ushort_as_half(static_cast<uint16_t>(word)));
  high = __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16)));
}
// One instruction converts two values.
template <typename T>
FM_DEVICE uint32_t pack_pair(float low, float high);
template <>
FM_DEVICE uint32_t pack_pair<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return static_cast<uint32_t>(__bfloat16_as_ushort(pair.x)) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
}
template <>
FM_DEVICE uint32_t pack_pair<Float16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return static_cast<uint32_t>(__half_as_ushort(pair.x)) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
}

#endif

}  // namespace fm

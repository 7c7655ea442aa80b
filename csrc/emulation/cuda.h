// CUDA for the host compiler: the types, variables and functions that the kernels and launch code of this project use.
//
// machine.cpp implements it; fused_megatron/audit/cuda_emulation.py builds and uses it. Not emulated: time, memory
// spaces, partial warp masks, clusters.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline

#define FM_CUDA_VECTOR_2(T, name, alignment) \
  struct alignas(alignment) name {           \
    T x, y;                                  \
  };                                         \
  inline name make_##name(T x, T y) { return {x, y}; }
#define FM_CUDA_VECTOR_4(T, name, alignment) \
  struct alignas(alignment) name {           \
    T x, y, z, w;                            \
  };                                         \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
FM_CUDA_VECTOR_2(uint16_t, ushort2, 4)
FM_CUDA_VECTOR_2(int32_t, int2, 8)
FM_CUDA_VECTOR_2(uint32_t, uint2, 8)
FM_CUDA_VECTOR_2(float, float2, 8)
FM_CUDA_VECTOR_2(int64_t, longlong2, 16)
FM_CUDA_VECTOR_2(uint64_t, ulonglong2, 16)
FM_CUDA_VECTOR_2(double, double2, 16)
FM_CUDA_VECTOR_4(uint16_t, ushort4, 8)
FM_CUDA_VECTOR_4(int32_t, int4, 16)
FM_CUDA_VECTOR_4(uint32_t, uint4, 16)
FM_CUDA_VECTOR_4(float, float4, 16)
#undef FM_CUDA_VECTOR_2
#undef FM_CUDA_VECTOR_4

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 gridDim, blockDim, blockIdx, threadIdx;
inline constexpr int warpSize = 32;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace fm::emulation {

// Runs a kernel; throws std::runtime_error, with kernel, block and thread, for behaviour that is undefined on a GPU.
void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            void (*call)(const void* body), const void* body);

template <typename Body>
void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            const Body& body) {
  const auto call = [](const void* any) { (*static_cast<const Body*>(any))(); };
  launch(name, kernel, grid, block, dynamic_shared_bytes, call, &body);
}

// Each thread declares the same arrays in the same order, so the n-th declaration is the same array for all threads.
void* shared_array(size_t bytes);
void* dynamic_shared_memory();
void allow_dynamic_shared(const void* kernel, size_t bytes);
void barrier();
// Returns the value of every lane of this warp, once all 32 have arrived.
const uint64_t* exchange(unsigned mask, uint64_t value);
unsigned lane();
int multiprocessors();
// Does nothing. GCC checks an address once between two calls: without this call it would not see, nor count, a store to
// an address that was just loaded.
void forget_checked_addresses();

template <typename T>
T* shared_memory(size_t count) {
  return static_cast<T*>(shared_array(count * sizeof(T)));
}

// Returns the value of `lane`, or this lane's own value if the group of `width` has no such lane.
template <typename T>
T shuffle(unsigned mask, T value, int source, int begin, int end) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* all = exchange(mask, bits);
  if (source >= begin && source < end) std::memcpy(&value, &all[source], sizeof(T));
  return value;
}

}  // namespace fm::emulation

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  fm::emulation::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), static_cast<size_t>(bytes));
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline void __syncthreads() { fm::emulation::barrier(); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { fm::emulation::exchange(mask, 0); }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int begin = static_cast<int>(fm::emulation::lane()) & ~(width - 1);
  return fm::emulation::shuffle(mask, value, begin + (source & (width - 1)), begin, begin + width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = static_cast<int>(fm::emulation::lane()), begin = lane & ~(width - 1);
  return fm::emulation::shuffle(mask, value, lane ^ lanes, 0, begin + width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int lane = static_cast<int>(fm::emulation::lane()), begin = lane & ~(width - 1);
  return fm::emulation::shuffle(mask, value, lane + static_cast<int>(lanes), begin, begin + width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int lane = static_cast<int>(fm::emulation::lane()), begin = lane & ~(width - 1);
  return fm::emulation::shuffle(mask, value, lane - static_cast<int>(lanes), begin, begin + width);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const uint64_t* all = fm::emulation::exchange(mask, predicate);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; ++i) bits |= static_cast<unsigned>(all[i]) << i;
  return bits;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == 0xFFFFFFFFu; }

// Threads never run at the same time.
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T before = *address;
  *address = before + value;
  return before;
}

template <typename T>
T __ldg(const T* address) { return *address; }
template <typename T>
T __ldcs(const T* address) { return *address; }
template <typename T>
T __ldcg(const T* address) { return *address; }
template <typename T>
void __stcs(T* address, std::type_identity_t<T> value) {
  fm::emulation::forget_checked_addresses();
  *address = value;
}
template <typename T>
void __stwb(T* address, std::type_identity_t<T> value) {
  fm::emulation::forget_checked_addresses();
  *address = value;
}
template <typename T>
void __stcg(T* address, std::type_identity_t<T> value) {
  fm::emulation::forget_checked_addresses();
  *address = value;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }
inline int32_t __mulhi(int32_t a, int32_t b) { return static_cast<int32_t>((int64_t{a} * b) >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline float __uint2float_rn(uint32_t value) { return static_cast<float>(value); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<uint32_t>(value)); }
inline int __popc(unsigned value) { return std::popcount(value); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

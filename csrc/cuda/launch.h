// Launches of kernels and their shared memory, for nvcc and for the emulation.
//
// Only this file differs between the CUDA compiler and the host emulation (fused_megatron/audit/cuda_emulation.py), so
// that both run the same kernels and launch code.
//
//   FM_LAUNCH(kernel, grid, block, stream, arguments...)
//   FM_LAUNCH_DYNAMIC(kernel, grid, block, dynamic_shared_bytes, stream, arguments...)
//   FM_SHARED(T, name, count)       an array in shared memory, for the whole block, at a multiple of 16 bytes
//   FM_DYNAMIC_SHARED(T, name)      an array whose size the launch sets; above 48 KiB a launch needs
//                                   cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)
#pragma once

#define FM_LAUNCH(kernel, grid, block, stream, ...) FM_LAUNCH_DYNAMIC(kernel, grid, block, 0, stream, __VA_ARGS__)

#ifdef FM_EMULATION

#include "emulation/cuda.h"

#define FM_DEVICE inline
#define FM_LAUNCH_DYNAMIC(kernel, grid, block, bytes, stream, ...)                                       \
  (static_cast<void>(stream),                                                                            \
   ::fm::emulation::launch(#kernel, reinterpret_cast<const void*>(+(kernel)), grid, block,               \
                           static_cast<size_t>(bytes), [&] { kernel(__VA_ARGS__); }))
#define FM_SHARED(T, name, count) T* name = ::fm::emulation::shared_memory<T>(count)
#define FM_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::fm::emulation::dynamic_shared_memory())

#else

#include <cuda_runtime.h>

#define FM_DEVICE __device__ __forceinline__
#define FM_LAUNCH_DYNAMIC(kernel, grid, block, bytes, stream, ...) kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)
#define FM_SHARED(T, name, count) __shared__ __align__(16) T name[count]
// One symbol for all kernels: declared as bytes, since its type must be the same everywhere.
#define FM_DYNAMIC_SHARED(T, name)                          \
  extern __shared__ __align__(16) char fm_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(fm_dynamic_shared)

#endif

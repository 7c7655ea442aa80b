// Launches of kernels and their shared memory, for nvcc and for the emulation.
//
// Only this file differs between the CUDA compiler and the host emulation (fused_megatron/audit/cuda_emulation.py), so
// that both run the same kernels and launch code.
//
//   FM_LAUNCH(kernel, grid, block, stream, arguments...)
//   FM_LAUNCH_DYNAMIC(kernel, grid, block, dynamic_shared_bytes, stream, arguments...)
//   FM_LAUNCH_AFTER(kernel, grid, block, stream, arguments...)
//                                   for a kernel that calls FM_WAIT_FOR_KERNEL_BEFORE(): from sm_90 on it may start
//                                   while the last blocks of the kernel before it in the stream still run
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
#define FM_LAUNCH_AFTER FM_LAUNCH  // a launch ends before the next begins
#define FM_WAIT_FOR_KERNEL_BEFORE() static_cast<void>(0)
#define FM_SHARED(T, name, count) T* name = ::fm::emulation::shared_memory<T>(count)
#define FM_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::fm::emulation::dynamic_shared_memory())

#else

#include <cuda_runtime.h>

#define FM_DEVICE __device__ __forceinline__
#define FM_LAUNCH_DYNAMIC(kernel, grid, block, bytes, stream, ...) kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)
#define FM_LAUNCH_AFTER(kernel, grid, block, stream, ...) ::fm::launch_after(kernel, grid, block, stream, __VA_ARGS__)
// Returns when the kernel before this one has ended and its stores can be read. The kernel before does not call
// cudaTriggerProgrammaticLaunchCompletion: that call only lets this kernel's blocks start sooner, where they would take
// the place of blocks that still have work. Every thread must come here before it reads, writes or returns: else this
// kernel, and with it the next one in the stream, could end and start before the kernel before has ended.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FM_WAIT_FOR_KERNEL_BEFORE() cudaGridDependencySynchronize()
#else
#define FM_WAIT_FOR_KERNEL_BEFORE() static_cast<void>(0)
#endif
#define FM_SHARED(T, name, count) __shared__ __align__(16) T name[count]
// One symbol for all kernels: declared as bytes, since its type must be the same everywhere.
#define FM_DYNAMIC_SHARED(T, name)                          \
  extern __shared__ __align__(16) char fm_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(fm_dynamic_shared)

namespace fm {

// Whether the current device can start a kernel before the end of the kernel before it; queried once a device.
inline bool starts_before_the_end() {
  constexpr int kDevices = 64;
  static int majors[kDevices] = {};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  if (majors[device] == 0) cudaDeviceGetAttribute(&majors[device], cudaDevAttrComputeCapabilityMajor, device);
  return majors[device] >= 9;
}

// A failure is the last error of the runtime, as after <<<>>>. A capture to a graph keeps the attribute as a kind of edge.
template <typename... Parameters, typename... Arguments>
void launch_after(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = starts_before_the_end() ? 1 : 0;
  static_cast<void>(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace fm

#endif

#pragma once

// How kernels are launched and how they get shared memory: the one place that differs between the CUDA compiler and
// the host emulation (fused_megatron/testing/cuda_emulation.py), so that both run the same kernels and launch code.
#ifdef FM_EMULATION

#include "cuda_emulation.h"

#define FM_DEVICE inline
#define FM_LAUNCH(kernel, grid, block, stream, ...) \
  (static_cast<void>(stream), ::fm::emulation::launch(grid, block, [&] { kernel(__VA_ARGS__); }))
#define FM_SHARED(T, name, count) T* name = ::fm::emulation::shared_memory<T>(count)

#else

#include <cuda_runtime.h>

#define FM_DEVICE __device__ __forceinline__
#define FM_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define FM_SHARED(T, name, count) __shared__ T name[count]

#endif

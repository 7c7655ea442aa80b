// How functions are inlined that the CPU and the GPU share, and those that are compiled once for each level of processor.
#pragma once

#ifdef __CUDACC__
#define FM_INLINE __device__ __forceinline__
#else
#define FM_INLINE inline __attribute__((always_inline))
#endif

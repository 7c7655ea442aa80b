// FM_INLINE: functions that the CPU and the GPU share, or that are compiled for several processor levels.
#pragma once

#ifdef __CUDACC__
#define FM_INLINE __device__ __forceinline__
#else
#define FM_INLINE inline __attribute__((always_inline))
#endif

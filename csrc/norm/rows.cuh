// Assignment of rows to the threads of the CUDA norms, forward and backward.
//
// A block has 16 warps and stays on its multiprocessor. kWarps warps share a row, so kGroups rows are in work at a
// time, and the next rows are in flight to shared memory. A thread has up to 32 columns. Values of columns (weight,
// bias, sums of gradients) are read or written once a block, not once a row.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cuda/row_reduction.cuh"
#include "cuda/row_streams.cuh"
#include "norm/arguments.cuh"

namespace fm {

inline constexpr int kNormThreads = 512;
inline constexpr int kNormColumns = 32;  // of a thread
inline constexpr int kNormMaxWidth = kNormThreads * kNormColumns;
inline constexpr int kNormMaxStages = 4;
inline constexpr int kSharedWithoutAsking = 48 * 1024;

// First: x or dy. Second: residual or total.
template <typename First, typename Second, int kWarps>
struct NormRows {
  static constexpr int kGroups = kNormThreads / kWarpSize / kWarps;
  static constexpr int kThreads = kWarps * kWarpSize;  // of a row
  static constexpr int kCount = First::kCount;
  static constexpr int kAccesses = kNormColumns / kCount;
  static constexpr int kStep = kThreads * kCount;
  static constexpr int kMaxWidth = kThreads * kNormColumns;
  using Slot = typename First::Slot;

  int lane, warp, group, first, width;

  FM_DEVICE explicit NormRows(int64_t width_)
      : lane(threadIdx.x % kWarpSize),
        warp(threadIdx.x / kWarpSize % kWarps),
        group(threadIdx.x / kThreads),
        first(threadIdx.x % kThreads * kCount),
        width(static_cast<int>(width_)) {}

  FM_DEVICE bool holds(int access) const { return first + access * kStep < width; }
  FM_DEVICE int column(int access) const { return first + access * kStep; }
  // Bit i: holds(i).
  FM_DEVICE int held() const {
    int bits = 0;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) bits |= holds(i) ? 1 << i : 0;
    return opaque(bits);
  }
  // Neighbouring blocks have neighbouring rows. Every group makes the same number of rounds, since groups share
  // barriers.
  FM_DEVICE int64_t row(int64_t round) const {
    return blockIdx.x + static_cast<int64_t>(gridDim.x) * (group + kGroups * round);
  }
  // From the row of a round to the row of the next round.
  static FM_DEVICE int64_t row_step() { return static_cast<int64_t>(gridDim.x) * kGroups; }
  static FM_DEVICE int64_t rounds(int64_t rows) {
    return (rows - blockIdx.x + row_step() - 1) / row_step();
  }
};

// A parameter's values for the columns of this thread, read from memory once a block. The values of the first kKept
// accesses are in registers, the others in shared memory (all of them, if several groups use them).
template <typename Rows, int kKept>
struct ColumnValues {
  static_assert(kKept == 0 || Rows::kGroups == 1);
  static constexpr int kCount = Rows::kCount, kQuads = kCount > 1 ? kCount / 4 : 1;
  static constexpr int kFirst = kKept;  // in shared memory
  float kept[kKept > 0 ? kKept : 1][kCount];
  const float4* shared;

  // `memory` has shared_bytes() bytes. With several groups a barrier must come between this and get().
  FM_DEVICE void load(const Rows& rows, ConstParameter parameter, float absent, float offset, float* memory) {
    shared = reinterpret_cast<const float4*>(memory);
#pragma unroll
    for (int i = 0; i < Rows::kAccesses; ++i) {
      if (!rows.holds(i) || i % Rows::kGroups != rows.group) continue;
      float values[kCount];
      load_parameter(parameter, rows.column(i), absent, values);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (i < kKept) {
          kept[i][k] = values[k] + offset;
        } else {
          memory[place(i, k)] = values[k] + offset;
        }
      }
    }
  }
  FM_DEVICE void get(int access, float (&values)[kCount]) const {
    if (access < kKept) {  // known at compile time, like the access
#pragma unroll
      for (int k = 0; k < kCount; ++k) values[k] = kept[access][k];
    } else if constexpr (kCount == 1) {
      values[0] = reinterpret_cast<const float*>(shared)[place(access, 0)];
    } else {
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        const float4 four = shared[place(access, 4 * quad) / 4];
        values[4 * quad] = four.x;
        values[4 * quad + 1] = four.y;
        values[4 * quad + 2] = four.z;
        values[4 * quad + 3] = four.w;
      }
    }
  }
  // Four values of a thread lie beside four values of its neighbour: no bank conflicts.
  static FM_DEVICE int place(int access, int k) {
    constexpr int kTogether = kCount > 1 ? 4 : 1;
    const int thread = threadIdx.x % Rows::kThreads;
    return (((access - kKept) * kQuads + k / kTogether) * Rows::kThreads + thread) * kTogether + k % kTogether;
  }
  static int64_t shared_bytes(int64_t width) {
    const int64_t accesses = (width + Rows::kStep - 1) / Rows::kStep;
    return std::max<int64_t>(accesses - kKept, 0) * Rows::kStep * static_cast<int64_t>(sizeof(float));
  }
};

// Bytes of shared memory for one stage of rows: `slots` slots for every access of every thread.
template <typename Rows>
int64_t norm_stage_bytes(int64_t width, int64_t slots) {
  const int64_t accesses = (width + Rows::kStep - 1) / Rows::kStep;
  return accesses * slots * kNormThreads * static_cast<int64_t>(sizeof(typename Rows::Slot));
}

// Persistent blocks, one for each multiprocessor: more blocks would read the parameters more often.
inline int64_t norm_blocks(int64_t rows, int multiprocessors) {
  return std::clamp<int64_t>(rows, 1, multiprocessors);
}

// In backward each block leaves a row of float32 sums: `sums` (1 or 2) times 8 bytes a column, written and read,
// besides `row_bytes` bytes a column and row of main traffic. The number of blocks keeps this share at 2% if at most a
// tenth of the multiprocessors must idle for it, which costs no memory bandwidth: 122 of an H100's 132 work for 8192
// rows of float32 (layer_norm) or 16 bits (rms_norm). With 8192 rows only layer_norm of 16 bits stays above: 3.9% (3.2%
// with a gradient into the total). Half of the multiprocessors would have to idle for 2%; from 16000 rows on it is
// below.
inline int64_t norm_parts(int64_t rows, int64_t row_bytes, int sums, int multiprocessors) {
  const int64_t affordable = rows * row_bytes / (50 * 8 * sums);
  const int64_t least = multiprocessors - multiprocessors / 10;
  return norm_blocks(rows, static_cast<int>(std::clamp<int64_t>(affordable, least, multiprocessors)));
}

// The dynamic shared memory that a block may have on this device, without the static shared memory of the kernels.
struct NormDevice {
  int multiprocessors;
  int64_t shared_bytes;
};

// Lets a kernel have `bytes` of dynamic shared memory; asked once a kernel, device and size, since the driver is slow.
// Returns false if the device refuses; check_launch then reports why.
template <auto* kKernel>
bool allow_dynamic_shared(int bytes) {
  constexpr int kDevices = 64;
  static std::atomic<int> allowed[kDevices] = {};
  int device = 0;
  if (bytes <= kSharedWithoutAsking) return true;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  if (allowed[device].load(std::memory_order_relaxed) >= bytes) return true;
  if (cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess) return false;
  allowed[device].store(bytes, std::memory_order_relaxed);
  return true;
}

// Calls f with the types of the two streams, for aligned rows.
template <typename F>
void for_norm_streams(DType dtype, DType stream_dtype, const F& f) {
  for_device_dtype(dtype, [&]<typename T>(T) {
    constexpr int kCount = 16 / sizeof(T);
    if (stream_dtype == dtype) {
      f(WideStream<T, kCount>(nullptr, dtype), WideStream<T, kCount>(nullptr, dtype));
    } else if constexpr (sizeof(T) == 2) {
      f(WideStream<T, kCount>(nullptr, dtype), WideStream<float, kCount>(nullptr, stream_dtype));
    }
  });
}

}  // namespace fm

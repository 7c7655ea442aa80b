// The CUDA kernel of an AdamW update over many tensors: plain pointers, no torch.
#pragma once

#include <cstdint>

#include "cuda/tensor_blocks.cuh"
#include "cuda/vector_access.cuh"

#include "update.h"

namespace fm {

inline constexpr int kAdamwThreads = 256;
// Elements of one block: every thread has four runs of four.
inline constexpr int64_t kAdamwChunk = 4096;
// Tensors of one launch; the arguments of a kernel have 4 KiB.
inline constexpr int kAdamwTensors = 64;

struct AdamwTensors {
  TensorBlocks<kAdamwTensors, kAdamwChunk> blocks;
  float* main[kAdamwTensors];
  float* first[kAdamwTensors];
  float* second[kAdamwTensors];
  float* gradient[kAdamwTensors];
  void* low[kAdamwTensors];
};

// T: dtype of the parameters beside the main weights; float where there are none.
template <typename T>
__global__ void __launch_bounds__(kAdamwThreads)
    adamw_kernel(AdamwTensors tensors, AdamwFactors factors, const float* gradient_scale, const bool* skip, bool zero) {
  constexpr bool kLow = sizeof(T) == 2;
  if (skip != nullptr && *skip) return;
  const float scale = *gradient_scale;
  const int index = tensors.blocks.tensor(), count = tensors.blocks.elements(index);
  const int64_t begin = tensors.blocks.begin(index);
  float* main = tensors.main[index] + begin;
  float* first = tensors.first[index] + begin;
  float* second = tensors.second[index] + begin;
  float* gradient = tensors.gradient[index] + begin;
  T* low = kLow ? static_cast<T*>(tensors.low[index]) + begin : nullptr;
  const auto address = reinterpret_cast<uintptr_t>(main) | reinterpret_cast<uintptr_t>(first) |
                       reinterpret_cast<uintptr_t>(second) | reinterpret_cast<uintptr_t>(gradient);
  const bool wide = address % 16 == 0 && reinterpret_cast<uintptr_t>(low) % 8 == 0;
  const int runs = wide ? count / 4 : 0;  // of four elements; the others follow one by one
  using A = Access<float, true>;
#pragma unroll 2
  for (int run = static_cast<int>(threadIdx.x); run < runs; run += kAdamwThreads) {
    const int i = 4 * run;
    float w[4], m[4], v[4], g[4];
    A::unpack(A::load(gradient + i), g);
    A::unpack(A::load(first + i), m);
    A::unpack(A::load(second + i), v);
    A::unpack(A::load(main + i), w);
#pragma unroll
    for (int k = 0; k < 4; ++k) adamw_element(factors, scale, g[k], w[k], m[k], v[k]);
    A::store_whole(first + i, m);
    A::store_whole(second + i, v);
    A::store_whole(main + i, w);
    if constexpr (kLow) {
      *reinterpret_cast<uint2*>(low + i) = make_uint2(pack_pair<T>(w[0], w[1]), pack_pair<T>(w[2], w[3]));
    }
    if (zero) A::store_whole(gradient + i, {0.0f, 0.0f, 0.0f, 0.0f});
  }
  for (int i = 4 * runs + static_cast<int>(threadIdx.x); i < count; i += kAdamwThreads) {
    float w = main[i], m = first[i], v = second[i];
    adamw_element(factors, scale, gradient[i], w, m, v);
    first[i] = m;
    second[i] = v;
    main[i] = w;
    if constexpr (kLow) low[i] = from_float<T>(w);
    if (zero) gradient[i] = 0.0f;
  }
}

}  // namespace fm

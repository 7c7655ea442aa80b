// Blocks of one launch over many tensors: a tensor has consecutive blocks, each with a chunk of its elements.
#pragma once

#include <climits>
#include <cstdint>

#include "cuda/launch.h"

namespace fm {

template <int kTensors, int64_t kChunk>
struct TensorBlocks {
  int64_t count[kTensors];       // of elements
  int first_block[kTensors + 1]; // of each tensor; the last is the number of blocks
  int num_tensors;

  // Adds a tensor with elements and returns its index; -1 if this launch is full.
  int add(int64_t elements) {
    const int64_t blocks = (elements + kChunk - 1) / kChunk, before = first_block[num_tensors];
    if (num_tensors == kTensors || (num_tensors > 0 && before + blocks > INT_MAX)) return -1;
    count[num_tensors] = elements;
    first_block[num_tensors + 1] = static_cast<int>(before + blocks);
    return num_tensors++;
  }

  int num_blocks() const { return first_block[num_tensors]; }

  // The tensor of this block.
  FM_DEVICE int tensor() const {
    int low = 0, high = num_tensors;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_block[middle] <= static_cast<int>(blockIdx.x) ? low : high) = middle;
    }
    return low;
  }

  // The first element of this block in its tensor.
  FM_DEVICE int64_t begin(int tensor) const {
    return static_cast<int64_t>(static_cast<int>(blockIdx.x) - first_block[tensor]) * kChunk;
  }

  // The number of elements of this block.
  FM_DEVICE int elements(int tensor) const {
    const int64_t rest = count[tensor] - begin(tensor);
    return static_cast<int>(rest < kChunk ? rest : kChunk);
  }
};

}  // namespace fm

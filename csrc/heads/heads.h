// The memory of the heads of query, key or value, for kernels on the CPU and the GPU.
#pragma once

#include <cstdint>

namespace fm {

// One tensor of heads and its result: [n0, n1, heads, head_dim] with any strides but the last, which is 1. Packed:
// n1 = 1. The result may be the tensor itself.
struct Heads {
  const void* data;
  void* out;
  int64_t heads, stride0, stride1, stride_head, out_stride0, out_stride1, out_stride_head;
};

}  // namespace fm

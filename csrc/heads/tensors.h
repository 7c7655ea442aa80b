// Tensors of heads: their checks, and their strides for the kernels.
#pragma once

#include "heads/heads.h"
#include "tensor_checks.h"

namespace fm {

// Returns x itself if the elements of a head lie side by side, else a copy.
inline Tensor with_dense_heads(const Tensor& x) {
  return x.stride(x.dim() - 1) == 1 || x.size(x.dim() - 1) <= 1 ? x : torch::stable::contiguous(x);
}

inline Heads heads_of(const Tensor& x, Tensor& out) {
  const int64_t dims = x.dim();
  return {x.const_data_ptr(), out.mutable_data_ptr(), x.size(dims - 2), x.stride(0), dims == 4 ? x.stride(1) : 0,
          x.stride(dims - 2), out.stride(0),          dims == 4 ? out.stride(1) : 0, out.stride(dims - 2)};
}

// The memory that an op writes heads to: of the sizes of x, with dense heads.
inline void check_heads_out(const Tensor& x, const Tensor& out) {
  STD_TORCH_CHECK(out.dim() == x.dim() && out.scalar_type() == x.scalar_type() && on_same_device(out, x),
                  "q_out and k_out must be like q and k");
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    STD_TORCH_CHECK(out.size(dim) == x.size(dim), "q_out and k_out must have the sizes of q and k");
  }
  STD_TORCH_CHECK(out.stride(out.dim() - 1) == 1 || out.size(out.dim() - 1) <= 1,
                  "the elements of a head of q_out and k_out must lie side by side");
}

}  // namespace fm

// Checks of query_key_norm's tensors, on the CPU and the GPU.
#pragma once

#include "heads/tensors.h"
#include "tensor_checks.h"

namespace fm {

// A thread keeps its columns of a head, and their sums.
inline constexpr int64_t kLargestNormedHead = 1024;

inline void check_tables(const Tensor& q, const OptionalTensor& cos, const OptionalTensor& sin) {
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin come together");
  if (!cos) return;
  check_kernel_dtype(*cos, "cos");
  STD_TORCH_CHECK(cos->dim() == 2 && sin->dim() == 2 && cos->size(0) == sin->size(0) && cos->size(1) == sin->size(1) &&
                      cos->scalar_type() == sin->scalar_type() && on_same_device(*cos, q) && on_same_device(*sin, q) &&
                      cos->size(0) >= q.size(0) && 2 * cos->size(1) <= q.size(3),
                  "cos and sin must be alike, [at least S, at most D / 2], on the device of q");
}

// Kernels have strides of heads as 32-bit numbers of bytes.
inline void check_head_stride(const Tensor& x) {
  STD_TORCH_CHECK(x.stride(2) < (int64_t{1} << 28), "heads must be less than 2^28 elements apart");
}

// q and k, [S, B, heads, D] each, and what comes with them.
inline void check_query_key(const Tensor& q, const Tensor& k, const OptionalTensor& cos, const OptionalTensor& sin) {
  check_kernel_dtype(q, "q");
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.scalar_type() == q.scalar_type() && k.size(0) == q.size(0) &&
                      k.size(1) == q.size(1) && k.size(3) == q.size(3) && on_same_device(k, q),
                  "q and k must be alike, [S, B, heads, D], but for the number of heads");
  STD_TORCH_CHECK(q.size(0) * q.size(1) < (int64_t{1} << 30), "q must have less than 2^30 tokens");
  STD_TORCH_CHECK(q.size(3) >= 1 && q.size(3) <= kLargestNormedHead, "a head must have 1 to ", kLargestNormedHead,
                  " elements");
  check_head_stride(q);
  check_head_stride(k);
  check_tables(q, cos, sin);
}

// The tensors of a backward that have the sizes of another: gradients and the heads that were normalised.
inline void check_heads_like(const Tensor& x, const Tensor& other, const char* message) {
  bool same = x.dim() == other.dim() && x.scalar_type() == other.scalar_type() && on_same_device(x, other);
  for (int64_t dim = 0; same && dim < x.dim(); ++dim) same = x.size(dim) == other.size(dim);
  STD_TORCH_CHECK(same, message);
}

inline void check_query_key_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& q,
                                     const Tensor& k, const Tensor& dq_out, const Tensor& dk_out,
                                     const Tensor& dv_out) {
  check_heads_like(dq, q, "dq must be like q");
  check_heads_like(dk, k, "dk must be like k");
  check_heads_like(dv, k, "dv must be like k");
  check_heads_out(q, dq_out);
  check_heads_out(k, dk_out);
  check_heads_out(k, dv_out);
}

inline Tensor checked_weight(const Tensor& weight, const Tensor& q, const char* name) {
  return *checked_parameter(weight, q, name);
}

}  // namespace fm

// Checks of rotary_embedding's tensors, and the positions of their tokens, on the CPU and the GPU.
#pragma once

#include "heads/tensors.h"
#include "tensor_checks.h"

#include "token_positions.h"

namespace fm {

inline void check_int64(const OptionalTensor& tensor, const Tensor& q, const char* name) {
  STD_TORCH_CHECK(!tensor || (tensor->scalar_type() == ScalarType::Long && on_same_device(*tensor, q)), name,
                  " must be int64 on the device of q");
}

inline void check_rotary(const Tensor& q, const OptionalTensor& k, const Tensor& cos, const Tensor& sin,
                         int64_t sequence_dim) {
  check_kernel_dtype(q, "q");
  check_kernel_dtype(cos, "cos");
  const int64_t dims = q.dim();
  STD_TORCH_CHECK((dims == 3 && sequence_dim == 0) || (dims == 4 && (sequence_dim == 0 || sequence_dim == 1)),
                  "q must be [T, N, D], or have four dims and sequence_dim 0 or 1");
  STD_TORCH_CHECK(!k || (k->dim() == dims && k->scalar_type() == q.scalar_type() && k->size(0) == q.size(0) &&
                         k->size(dims - 3) == q.size(dims - 3) && k->size(dims - 1) == q.size(dims - 1) &&
                         on_same_device(*k, q)),
                  "k must be like q but for the number of heads");
  STD_TORCH_CHECK(cos.dim() == 2 && sin.dim() == 2 && cos.size(0) == sin.size(0) && cos.size(1) == sin.size(1) &&
                      cos.scalar_type() == sin.scalar_type() && on_same_device(cos, q) && on_same_device(sin, q) &&
                      2 * cos.size(1) <= q.size(dims - 1),
                  "cos and sin must be alike, [P, at most D / 2], on the device of q");
}

inline TokenPositions token_positions(const Tensor& q, const Tensor& cos, const OptionalTensor& positions,
                                      const OptionalTensor& offset, const OptionalTensor& cu_seqlens, int64_t start,
                                      int64_t sequence_dim) {
  check_int64(positions, q, "positions");
  check_int64(offset, q, "offset");
  TokenPositions p{};
  p.start = start;
  p.table_rows = cos.size(0);
  p.sequence_dim = static_cast<int32_t>(sequence_dim);
  int64_t sequences = q.dim() == 4 ? q.size(1 - sequence_dim) : 1;
  if (positions) {
    const bool one_for_all = positions->dim() == 1;
    STD_TORCH_CHECK(one_for_all ? positions->size(0) == q.size(sequence_dim)
                                : positions->dim() == 2 && q.dim() == 4 && positions->size(0) == q.size(0) &&
                                      positions->size(1) == q.size(1),
                    "positions must be [S] or have the first two sizes of q");
    p.positions = static_cast<const int64_t*>(positions->const_data_ptr());
    p.positions_stride0 = !one_for_all || sequence_dim == 0 ? positions->stride(0) : 0;
    p.positions_stride1 = !one_for_all ? positions->stride(1) : sequence_dim == 1 ? positions->stride(0) : 0;
  }
  if (cu_seqlens) {
    const ScalarType dtype = cu_seqlens->scalar_type();
    STD_TORCH_CHECK(q.dim() == 3 && cu_seqlens->dim() == 1 && cu_seqlens->numel() > 0 && cu_seqlens->is_contiguous() &&
                        (dtype == ScalarType::Int || dtype == ScalarType::Long) && on_same_device(*cu_seqlens, q),
                    "cu_seqlens must be [n + 1] int32 or int64 on the device of q, and q [T, N, D]");
    p.cu_seqlens = cu_seqlens->const_data_ptr();
    p.cu_seqlens_is_64 = dtype == ScalarType::Long;
    p.num_sequences = sequences = cu_seqlens->numel() - 1;
  }
  if (offset) {
    STD_TORCH_CHECK(offset->is_contiguous() && (offset->numel() == 1 || offset->numel() == sequences),
                    "offset must have one element, or one a sequence");
    p.offset = static_cast<const int64_t*>(offset->const_data_ptr());
    p.offset_stride = offset->numel() == 1 ? 0 : 1;
  }
  return p;
}

}  // namespace fm

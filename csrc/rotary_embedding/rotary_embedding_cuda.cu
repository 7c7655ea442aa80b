// rotary_embedding on the GPU: the functions from tensors to tensors.
#include <tuple>

#include "cuda/launch_checks.h"

#include "rotary_checks.h"
#include "rotary_embedding_kernels.cuh"

namespace fm {
namespace {

// Rotates q and k, whose heads may have any strides; no k: k has 0 heads.
void rotate_all(const Tensor& q, const Heads& q_heads, const Heads& k_heads, const Tensor& cos_any,
                const Tensor& sin_any, const OptionalTensor& positions, const OptionalTensor& offset,
                const OptionalTensor& cu_seqlens, int64_t start, int64_t sequence_dim, bool interleaved,
                bool inverse) {
  const Tensor cos = made_contiguous(cos_any), sin = made_contiguous(sin_any);
  Rotary a{};
  a.dtype = device_dtype(q.scalar_type());
  a.interleaved = interleaved;
  a.sign = inverse ? -1.0f : 1.0f;
  a.q = q_heads;
  a.k = k_heads;
  a.cos = {cos.const_data_ptr(), device_dtype(cos.scalar_type())};
  a.sin = {sin.const_data_ptr(), device_dtype(sin.scalar_type())};
  a.where = token_positions(q, cos, positions, offset, cu_seqlens, start, sequence_dim);
  a.n1 = q.dim() == 4 ? q.size(1) : 1;
  a.tokens = q.size(0) * a.n1;
  a.head_dim = q.size(q.dim() - 1);
  a.half = cos.size(1);
  launch_rotary(a, multiprocessors(), current_stream(q));
  check_launch("rotary_embedding");
}

std::tuple<Tensor, Tensor> rotary_embedding(const Tensor& q_any, const OptionalTensor& k_any, const Tensor& cos,
                                            const Tensor& sin, const OptionalTensor& positions,
                                            const OptionalTensor& offset, const OptionalTensor& cu_seqlens,
                                            int64_t start, int64_t sequence_dim, bool interleaved, bool inverse) {
  check_rotary(q_any, k_any, cos, sin, sequence_dim);
  const DeviceGuard guard(q_any.get_device());
  const Tensor q = with_dense_heads(q_any), k = with_dense_heads(k_any ? *k_any : q_any);
  Tensor q_out = empty(Sizes(q), q.scalar_type(), q), k_out = k_any ? empty(Sizes(k), k.scalar_type(), k) : nothing(q);
  rotate_all(q, heads_of(q, q_out), k_any ? heads_of(k, k_out) : Heads{}, cos, sin, positions, offset, cu_seqlens,
             start, sequence_dim, interleaved, inverse);
  return {q_out, k_out};
}

void rotary_embedding_out(const Tensor& q_any, const Tensor& k_any, Tensor q_out, Tensor k_out, const Tensor& cos,
                          const Tensor& sin, int64_t sequence_dim, bool inverse) {
  check_rotary(q_any, k_any, cos, sin, sequence_dim);
  check_heads_out(q_any, q_out);
  check_heads_out(k_any, k_out);
  const DeviceGuard guard(q_any.get_device());
  const Tensor q = with_dense_heads(q_any), k = with_dense_heads(k_any);
  rotate_all(q, heads_of(q, q_out), heads_of(k, k_out), cos, sin, std::nullopt, std::nullopt, std::nullopt, 0,
             sequence_dim, false, inverse);
}

}  // namespace
}  // namespace fm

FM_CUDA_LIBRARY_IMPL(m) {
  m.impl("rotary_embedding", TORCH_BOX(&fm::rotary_embedding));
  m.impl("rotary_embedding_out", TORCH_BOX(&fm::rotary_embedding_out));
}

// rotary_embedding on the GPU: the functions from tensors to tensors.
#include <tuple>

#include "cuda/launch_checks.h"

#include "rotary_checks.h"
#include "rotary_embedding_kernels.cuh"

namespace fm {
namespace {

DeviceHeads device_heads(const Heads& heads) {
  return {heads.data, heads.out, heads.heads, heads.stride0, heads.stride1, heads.stride_head};
}

std::tuple<Tensor, Tensor> rotary_embedding(const Tensor& q_any, const OptionalTensor& k_any, const Tensor& cos_any,
                                            const Tensor& sin_any, const OptionalTensor& positions,
                                            const OptionalTensor& offset, const OptionalTensor& cu_seqlens,
                                            int64_t start, int64_t sequence_dim, bool interleaved, bool inverse) {
  check_rotary(q_any, k_any, cos_any, sin_any, sequence_dim);
  const DeviceGuard guard(q_any.get_device());
  const Tensor cos = made_contiguous(cos_any), sin = made_contiguous(sin_any);
  const Tensor q = with_dense_heads(q_any), k = with_dense_heads(k_any ? *k_any : q_any);
  Tensor q_out = empty(Sizes(q), q.scalar_type(), q), k_out = k_any ? empty(Sizes(k), k.scalar_type(), k) : nothing(q);
  Rotary a{};
  a.dtype = device_dtype(q.scalar_type());
  a.interleaved = interleaved;
  a.sign = inverse ? -1.0f : 1.0f;
  a.q = device_heads(heads_of(q, q_out));
  if (k_any) a.k = device_heads(heads_of(k, k_out));
  a.cos = {cos.const_data_ptr(), device_dtype(cos.scalar_type())};
  a.sin = {sin.const_data_ptr(), device_dtype(sin.scalar_type())};
  a.where = token_positions(q, cos, positions, offset, cu_seqlens, start, sequence_dim);
  a.n1 = q.dim() == 4 ? q.size(1) : 1;
  a.tokens = q.size(0) * a.n1;
  a.head_dim = q.size(q.dim() - 1);
  a.half = cos.size(1);
  launch_rotary(a, multiprocessors(), current_stream(q));
  check_launch("rotary_embedding");
  return {q_out, k_out};
}

}  // namespace
}  // namespace fm

FM_CUDA_LIBRARY_IMPL(m) { m.impl("rotary_embedding", TORCH_BOX(&fm::rotary_embedding)); }

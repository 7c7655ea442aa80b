// query_key_norm on the GPU: the functions from tensors to tensors.
#include <tuple>

#include "cuda/launch_checks.h"

#include "query_key_norm_backward.cuh"
#include "query_key_norm_checks.h"

namespace fm {
namespace {

// What forward and backward have in common; the tensors stay with the caller.
QueryKeyNorm parameters_of(const Tensor& q, const Tensor& q_weight, const Tensor& k_weight, const OptionalTensor& cos,
                           const OptionalTensor& sin, double eps) {
  QueryKeyNorm a{};
  a.dtype = device_dtype(q.scalar_type());
  a.eps = static_cast<float>(eps);
  a.q_weight = const_parameter(q_weight);
  a.k_weight = const_parameter(k_weight);
  a.cos = const_parameter(cos);
  a.sin = const_parameter(sin);
  a.n1 = q.size(1);
  a.tokens = q.size(0) * a.n1;
  a.head_dim = q.size(3);
  a.half = cos ? cos->size(1) : 0;
  return a;
}

OptionalTensor dense_table(const OptionalTensor& table) {
  return table ? OptionalTensor(made_contiguous(*table)) : std::nullopt;
}

void query_key_norm_out(const Tensor& q_any, const Tensor& k_any, Tensor q_out, Tensor k_out, const Tensor& q_weight_any,
                        const Tensor& k_weight_any, const OptionalTensor& cos_any, const OptionalTensor& sin_any,
                        double eps) {
  check_query_key(q_any, k_any, cos_any, sin_any);
  check_heads_out(q_any, q_out);
  check_heads_out(k_any, k_out);
  const DeviceGuard guard(q_any.get_device());
  const Tensor q = with_dense_heads(q_any), k = with_dense_heads(k_any);
  const Tensor q_weight = checked_weight(q_weight_any, q, "q_weight");
  const Tensor k_weight = checked_weight(k_weight_any, q, "k_weight");
  const OptionalTensor cos = dense_table(cos_any), sin = dense_table(sin_any);
  QueryKeyNorm a = parameters_of(q, q_weight, k_weight, cos, sin, eps);
  a.q = heads_of(q, q_out);
  a.k = heads_of(k, k_out);
  launch_query_key_norm(a, multiprocessors(), current_stream(q));
  check_launch("query_key_norm_out");
}

std::tuple<Tensor, Tensor> query_key_norm_backward_out(
    const Tensor& dq_any, const Tensor& dk_any, const Tensor& dv_any, const Tensor& q_any, const Tensor& k_any,
    Tensor dq_out, Tensor dk_out, Tensor dv_out, const Tensor& q_weight_any, const Tensor& k_weight_any,
    const OptionalTensor& cos_any, const OptionalTensor& sin_any, double eps) {
  check_query_key(q_any, k_any, cos_any, sin_any);
  check_query_key_backward(dq_any, dk_any, dv_any, q_any, k_any, dq_out, dk_out, dv_out);
  const DeviceGuard guard(q_any.get_device());
  const Tensor dq = with_dense_heads(dq_any), dk = with_dense_heads(dk_any), dv = with_dense_heads(dv_any);
  const Tensor q = with_dense_heads(q_any), k = with_dense_heads(k_any);
  const Tensor q_weight = checked_weight(q_weight_any, q, "q_weight");
  const Tensor k_weight = checked_weight(k_weight_any, q, "k_weight");
  const OptionalTensor cos = dense_table(cos_any), sin = dense_table(sin_any);
  Tensor q_dweight = empty(Sizes(q_weight), q_weight.scalar_type(), q_weight);
  Tensor k_dweight = empty(Sizes(k_weight), k_weight.scalar_type(), k_weight);
  QueryKeyNorm a = parameters_of(q, q_weight, k_weight, cos, sin, eps);
  a.q = heads_of(dq, dq_out);
  a.k = heads_of(dk, dk_out);
  a.v = heads_of(dv, dv_out);
  a.q_input = heads_of(q, dq_out);
  a.k_input = heads_of(k, dk_out);
  a.shares = query_key_norm_shares(a, multiprocessors());
  const int64_t partial_sizes[] = {a.shares.blocks * 2 * a.head_dim};
  Tensor partials = empty(partial_sizes, ScalarType::Float, q);
  a.partials = static_cast<float*>(partials.mutable_data_ptr());
  launch_query_key_norm_backward(a, mutable_parameter(q_dweight, true), mutable_parameter(k_dweight, true),
                                 current_stream(q));
  check_launch("query_key_norm_backward_out");
  return {q_dweight, k_dweight};
}

}  // namespace
}  // namespace fm

FM_CUDA_LIBRARY_IMPL(m) {
  m.impl("query_key_norm_out", TORCH_BOX(&fm::query_key_norm_out));
  m.impl("query_key_norm_backward_out", TORCH_BOX(&fm::query_key_norm_backward_out));
}

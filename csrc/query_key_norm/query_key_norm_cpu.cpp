// query_key_norm on the CPU: each head of q and k is divided by its root mean square, scaled and rotated, in one pass.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "cpu/column_sums.h"
#include "cpu/multiversion.h"
#include "cpu/numbers.h"
#include "cpu/parameter.h"
#include "cpu/sum.h"

#include "query_key_norm_checks.h"

namespace fm {
namespace {

// One head dim for all heads of a token. The first 2 half elements rotate, in pairs that are `half` apart.
struct HeadForm {
  int64_t head_dim, half;
  float eps;
  const float *cos, *sin;  // of the token
};

template <typename T>
struct ForwardHeads {
  const T* x;
  T* y;  // may be x
  int64_t heads, stride, out_stride;
  const float* weight;
};

template <typename T>
struct BackwardHeads {
  const T *dy, *x;
  T* dx;
  int64_t heads, dy_stride, x_stride, out_stride;
  const float* weight;
  float* dweight;  // the sums of this part of the tokens
  float* gradient;  // memory for a head: the gradient of the normalised and scaled head, which was not rotated
};

template <typename T>
FM_INLINE void normalise_and_rotate(const ForwardHeads<T>& a, const HeadForm& form) {
  const int64_t half = form.half, head_dim = form.head_dim;
  const float *cos = form.cos, *sin = form.sin, *weight = a.weight;
  for (int64_t head = 0; head < a.heads; ++head) {
    const T* x = a.x + head * a.stride;
    T* y = a.y + head * a.out_stride;
    float squares[1];
    lane_sums(head_dim, squares, [&](int64_t j, float* lane) __attribute__((always_inline)) {
      lane[0] += to_float(x[j]) * to_float(x[j]);
    });
    const float rstd = 1.0f / std::sqrt(squares[0] / static_cast<float>(head_dim) + form.eps);
    // A pair is read before it is written.
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float first = to_float(x[i]) * rstd * weight[i];
      const float second = to_float(x[half + i]) * rstd * weight[half + i];
      y[i] = from_float<T>(first * cos[i] - second * sin[i]);
      y[half + i] = from_float<T>(second * cos[i] + first * sin[i]);
    }
#pragma omp simd
    for (int64_t i = 2 * half; i < head_dim; ++i) y[i] = from_float<T>(to_float(x[i]) * rstd * weight[i]);
  }
}

template <typename T>
FM_INLINE void rotate_back(const T* __restrict dy, const HeadForm& form, float* __restrict gradient) {
  const int64_t half = form.half;
  const float *cos = form.cos, *sin = form.sin;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float first = to_float(dy[i]), second = to_float(dy[half + i]);
    gradient[i] = first * cos[i] + second * sin[i];
    gradient[half + i] = second * cos[i] - first * sin[i];
  }
#pragma omp simd
  for (int64_t i = 2 * half; i < form.head_dim; ++i) gradient[i] = to_float(dy[i]);
}

// With n = x rstd and g = weight * gradient: dx = rstd (g - n mean(g n)), and dweight gathers gradient n. Both sums over
// a head are made before rstd is known: mean(g n) is rstd mean(g x).
template <typename T>
FM_INLINE void backward_of_heads(const BackwardHeads<T>& a, const HeadForm& form) {
  const int64_t head_dim = form.head_dim;
  const float* __restrict weight = a.weight;
  float* __restrict dweight = a.dweight;
  float* __restrict gradient = a.gradient;
  for (int64_t head = 0; head < a.heads; ++head) {
    const T* __restrict x = a.x + head * a.x_stride;
    T* __restrict dx = a.dx + head * a.out_stride;
    rotate_back(a.dy + head * a.dy_stride, form, gradient);
    float sums[2];
    lane_sums(head_dim, sums, [&](int64_t j, float* lane) __attribute__((always_inline)) {
      const float value = to_float(x[j]);
      lane[0] += value * value;
      lane[kSumLanes] += gradient[j] * weight[j] * value;
    });
    const float count = static_cast<float>(head_dim);
    const float rstd = 1.0f / std::sqrt(sums[0] / count + form.eps);
    const float projection = rstd * sums[1] / count;
#pragma omp simd
    for (int64_t j = 0; j < head_dim; ++j) {
      const float normalised = to_float(x[j]) * rstd;
      dweight[j] += gradient[j] * normalised;
      dx[j] = from_float<T>(rstd * (gradient[j] * weight[j] - normalised * projection));
    }
  }
}

// target_clones takes no templates, so every dtype is a plain function.
#define FM_HEADS(T)                                                                                              \
  FM_MULTIVERSION void run_heads(const ForwardHeads<T>& a, const HeadForm& form) { normalise_and_rotate(a, form); } \
  FM_MULTIVERSION void run_heads(const BackwardHeads<T>& a, const HeadForm& form) { backward_of_heads(a, form); }
FM_HEADS(float)
FM_HEADS(BFloat16)
FM_HEADS(Float16)
#undef FM_HEADS

constexpr int64_t kGrainElements = 16384;

// The tables as float32; without tables no element rotates.
struct Angles {
  OptionalTensor cos_table, sin_table;
  FloatParameter cos, sin;
  int64_t half;

  Angles(const OptionalTensor& cos_any, const OptionalTensor& sin_any)
      : cos_table(dense(cos_any)),
        sin_table(dense(sin_any)),
        cos(cos_table, elements(cos_table), 1.0f),
        sin(sin_table, elements(sin_table), 0.0f),
        half(cos_table ? cos_table->size(1) : 0) {}
  static OptionalTensor dense(const OptionalTensor& table) {
    return table ? OptionalTensor(made_contiguous(*table)) : std::nullopt;
  }
  static int64_t elements(const OptionalTensor& table) { return table ? table->numel() : 0; }
  HeadForm form(int64_t position, int64_t head_dim, float eps) const {
    return {head_dim, half, eps, cos.data() + position * half, sin.data() + position * half};
  }
};

void query_key_norm_out(const Tensor& q_any, const Tensor& k_any, Tensor q_out, Tensor k_out, const Tensor& q_weight_any,
                        const Tensor& k_weight_any, const OptionalTensor& cos, const OptionalTensor& sin, double eps) {
  check_query_key(q_any, k_any, cos, sin);
  check_heads_out(q_any, q_out);
  check_heads_out(k_any, k_out);
  const Tensor q = with_dense_heads(q_any), k = with_dense_heads(k_any);
  const Heads all[2] = {heads_of(q, q_out), heads_of(k, k_out)};
  const int64_t n1 = q.size(1), tokens = q.size(0) * n1, head_dim = q.size(3);
  const int64_t token_elements = (all[0].heads + all[1].heads) * head_dim;
  if (tokens == 0 || token_elements == 0) return;
  const Tensor q_weight = checked_weight(q_weight_any, q, "q_weight");
  const Tensor k_weight = checked_weight(k_weight_any, q, "k_weight");
  const FloatParameter weights[2] = {{q_weight, head_dim, 1.0f}, {k_weight, head_dim, 1.0f}};
  const Angles angles(cos, sin);
  for_cpu_dtype(q.scalar_type(), [&]<typename T>(T) {
    const int64_t grain = std::max<int64_t>(1, kGrainElements / token_elements);
    torch::stable::parallel_for(0, tokens, grain, [&](int64_t first, int64_t last) {
      for (int64_t token = first; token < last; ++token) {
        const int64_t i0 = token / n1, i1 = token % n1;
        for (int which = 0; which < 2; ++which) {
          const Heads& x = all[which];
          run_heads(ForwardHeads<T>{static_cast<const T*>(x.data) + i0 * x.stride0 + i1 * x.stride1,
                                    static_cast<T*>(x.out) + i0 * x.out_stride0 + i1 * x.out_stride1, x.heads,
                                    x.stride_head, x.out_stride_head, weights[which].data()},
                    angles.form(i0, head_dim, static_cast<float>(eps)));
        }
      }
    });
  });
}

template <typename T>
void copy_heads(const Heads& x, int64_t i0, int64_t i1, int64_t head_dim) {
  const T* from = static_cast<const T*>(x.data) + i0 * x.stride0 + i1 * x.stride1;
  T* to = static_cast<T*>(x.out) + i0 * x.out_stride0 + i1 * x.out_stride1;
  for (int64_t head = 0; head < x.heads; ++head) {
    std::memcpy(to + head * x.out_stride_head, from + head * x.stride_head, head_dim * sizeof(T));
  }
}

std::tuple<Tensor, Tensor> query_key_norm_backward_out(
    const Tensor& dq_any, const Tensor& dk_any, const Tensor& dv_any, const Tensor& q_any, const Tensor& k_any,
    Tensor dq_out, Tensor dk_out, Tensor dv_out, const Tensor& q_weight_any, const Tensor& k_weight_any,
    const OptionalTensor& cos, const OptionalTensor& sin, double eps) {
  check_query_key(q_any, k_any, cos, sin);
  check_query_key_backward(dq_any, dk_any, dv_any, q_any, k_any, dq_out, dk_out, dv_out);
  const Tensor dq = with_dense_heads(dq_any), dk = with_dense_heads(dk_any), dv = with_dense_heads(dv_any);
  const Tensor q = with_dense_heads(q_any), k = with_dense_heads(k_any);
  const Heads gradients[2] = {heads_of(dq, dq_out), heads_of(dk, dk_out)}, values = heads_of(dv, dv_out);
  const Heads inputs[2] = {heads_of(q, dq_out), heads_of(k, dk_out)};
  const Tensor q_weight = checked_weight(q_weight_any, q, "q_weight");
  const Tensor k_weight = checked_weight(k_weight_any, q, "k_weight");
  Tensor dweights[2] = {empty(Sizes(q_weight), q_weight.scalar_type(), q_weight),
                        empty(Sizes(k_weight), k_weight.scalar_type(), k_weight)};
  const int64_t n1 = q.size(1), tokens = q.size(0) * n1, head_dim = q.size(3), parts = row_parts(tokens);
  const FloatParameter weights[2] = {{q_weight, head_dim, 1.0f}, {k_weight, head_dim, 1.0f}};
  const Angles angles(cos, sin);
  const Scratch partials = make_scratch(parts * 2 * head_dim);
  for_cpu_dtype(q.scalar_type(), [&]<typename T>(T) {
    const int64_t part_elements = std::max<int64_t>(1, (q.numel() + k.numel()) / parts);
    torch::stable::parallel_for(0, parts, std::max<int64_t>(1, kGrainElements / part_elements), [&](int64_t first,
                                                                                                   int64_t last) {
      const Scratch gradient = make_scratch(head_dim);
      for (int64_t part = first; part < last; ++part) {
        float* sums = partials.get() + part * 2 * head_dim;
        std::fill(sums, sums + 2 * head_dim, 0.0f);
        for (int64_t token = part_begin(part, parts, tokens); token < part_begin(part + 1, parts, tokens); ++token) {
          const int64_t i0 = token / n1, i1 = token % n1;
          for (int which = 0; which < 2; ++which) {
            const Heads &dy = gradients[which], &x = inputs[which];
            run_heads(BackwardHeads<T>{static_cast<const T*>(dy.data) + i0 * dy.stride0 + i1 * dy.stride1,
                                       static_cast<const T*>(x.data) + i0 * x.stride0 + i1 * x.stride1,
                                       static_cast<T*>(dy.out) + i0 * dy.out_stride0 + i1 * dy.out_stride1, dy.heads,
                                       dy.stride_head, x.stride_head, dy.out_stride_head, weights[which].data(),
                                       sums + which * head_dim, gradient.get()},
                      angles.form(i0, head_dim, static_cast<float>(eps)));
          }
          copy_heads<T>(values, i0, i1, head_dim);
        }
      }
    });
  });
  for (int which = 0; which < 2; ++which) {
    for_cpu_dtype(dweights[which].scalar_type(), [&]<typename W>(W) {
      W* out = static_cast<W*>(dweights[which].mutable_data_ptr());
      finish_column_sums(partials.get() + which * head_dim, parts, head_dim, 2 * head_dim,
                         [&](int64_t j, float sum) { out[j] = from_float<W>(sum); });
    });
  }
  return {dweights[0], dweights[1]};
}

}  // namespace
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) {
  m.impl("query_key_norm_out", TORCH_BOX(&fm::query_key_norm_out));
  m.impl("query_key_norm_backward_out", TORCH_BOX(&fm::query_key_norm_backward_out));
}

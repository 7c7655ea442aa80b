// rotary_embedding on the CPU: the rotation of the heads of q and k by the angles of their tokens.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <tuple>

#include "cpu/multiversion.h"
#include "cpu/numbers.h"
#include "cpu/parameter.h"
#include "cpu/streaming.h"

#include "rotary_checks.h"

namespace fm {
namespace {

// All heads of one token, which lie `stride` elements apart. `from` and `to` may be the same memory: a pair is read
// before it is written.
template <typename T, bool kInterleaved>
FM_INLINE void rotate(const T* x, int64_t stride, int64_t heads, const float* __restrict cos,
                      const float* __restrict sin, int64_t half, int64_t head_dim, T* y, int64_t out_stride) {
  for (int64_t head = 0; head < heads; ++head) {
    const T* from = x + head * stride;
    T* to = y + head * out_stride;
    if constexpr (kInterleaved) {
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const float first = to_float(from[2 * i]), second = to_float(from[2 * i + 1]);
        to[2 * i] = from_float<T>(first * cos[i] - second * sin[i]);
        to[2 * i + 1] = from_float<T>(second * cos[i] + first * sin[i]);
      }
    } else {
      const T* from_second = from + half;
      T* to_second = to + half;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const float first = to_float(from[i]), second = to_float(from_second[i]);
        to[i] = from_float<T>(first * cos[i] - second * sin[i]);
        to_second[i] = from_float<T>(second * cos[i] + first * sin[i]);
      }
    }
    const int64_t rest = head_dim - 2 * half;
    if (rest > 0 && to != from) std::memcpy(to + 2 * half, from + 2 * half, rest * sizeof(T));
  }
}

// target_clones takes no templates, so every combination is a plain function.
#define FM_ROTATE(T, kInterleaved)                                                                              \
  FM_MULTIVERSION void rotate_heads(const T* x, int64_t stride, int64_t heads, const float* cos, const float* sin, \
                                    int64_t half, int64_t head_dim, T* y, int64_t out_stride,                   \
                                    std::bool_constant<kInterleaved>) {                                         \
    rotate<T, kInterleaved>(x, stride, heads, cos, sin, half, head_dim, y, out_stride);                         \
  }
FM_ROTATE(float, false)
FM_ROTATE(float, true)
FM_ROTATE(BFloat16, false)
FM_ROTATE(BFloat16, true)
FM_ROTATE(Float16, false)
FM_ROTATE(Float16, true)
#undef FM_ROTATE

constexpr int64_t kGrainElements = 16384;
constexpr int64_t kBufferBytes = 8192;

// Loads one row of a table as float32, times sign; NaN if there is no row.
void load_angles(const Tensor& table, int64_t row, float sign, int64_t half, float* angles) {
  if (row < 0) {
    std::fill(angles, angles + half, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  for_cpu_dtype(table.scalar_type(), [&]<typename T>(T) {
    const T* values = static_cast<const T*>(table.const_data_ptr()) + row * half;
    for (int64_t i = 0; i < half; ++i) angles[i] = sign * to_float(values[i]);
  });
}

// Rotates the heads of `all` (q, and k if it has heads), whose tensors are like q.
void rotate_all(const Tensor& q, std::array<Heads, 2> all, const Tensor& cos_any, const Tensor& sin_any,
                const OptionalTensor& positions, const OptionalTensor& offset, const OptionalTensor& cu_seqlens,
                int64_t start, int64_t sequence_dim, bool interleaved, bool inverse) {
  const Tensor cos = made_contiguous(cos_any), sin = made_contiguous(sin_any);
  const TokenPositions where = token_positions(q, cos, positions, offset, cu_seqlens, start, sequence_dim);
  const int64_t n1 = q.dim() == 4 ? q.size(1) : 1, tokens = q.size(0) * n1;
  const int64_t head_dim = q.size(q.dim() - 1), half = cos.size(1);
  const int64_t token_elements = (all[0].heads + all[1].heads) * head_dim;
  if (tokens == 0 || token_elements == 0) return;
  const auto run = [&]<typename T>(T, auto form) {
    // Large results are written to a buffer first, some heads at a time, and streamed past the caches.
    const int64_t head_bytes = head_dim * static_cast<int64_t>(sizeof(T));
    bool large = tokens * token_elements * static_cast<int64_t>(sizeof(T)) >= kStreamFromBytes &&
                 head_bytes <= kBufferBytes;
    // The lines of strided results are shared with other tensors, or in the cache as the input.
    for (const Heads& x : all) large = large && (x.heads == 0 || x.out_stride_head == head_dim) && x.out != x.data;
    const int64_t heads_at_a_time = large ? kBufferBytes / head_bytes : token_elements;
    const auto rotate_tokens = [&](int64_t first, int64_t last) {
      const Scratch angles = make_scratch(2 * half);
      alignas(64) char buffer[kBufferBytes];
      for (int64_t token = first; token < last; ++token) {
        const int64_t i0 = token / n1, i1 = token % n1, row = token_position(where, i0, i1);
        load_angles(cos, row, 1.0f, half, angles.get());
        load_angles(sin, row, inverse ? -1.0f : 1.0f, half, angles.get() + half);
        for (const Heads& x : all) {
          const T* from = static_cast<const T*>(x.data) + i0 * x.stride0 + i1 * x.stride1;
          T* to = static_cast<T*>(x.out) + i0 * x.out_stride0 + i1 * x.out_stride1;
          for (int64_t head = 0; head < x.heads; head += heads_at_a_time) {
            const int64_t heads = std::min(heads_at_a_time, x.heads - head);
            T* result = to + head * x.out_stride_head;
            const int64_t num_bytes = heads * head_dim * static_cast<int64_t>(sizeof(T));
            const bool stream = large && is_line_aligned(result) && num_bytes % kLineBytes == 0;
            T* target = stream ? reinterpret_cast<T*>(buffer) : result;
            rotate_heads(from + head * x.stride_head, x.stride_head, heads, angles.get(), angles.get() + half, half,
                         head_dim, target, stream ? head_dim : x.out_stride_head, form);
            if (stream) stream_copy(result, buffer, num_bytes);
          }
        }
      }
      if (large) finish_streaming();
    };
    torch::stable::parallel_for(0, tokens, std::max<int64_t>(1, kGrainElements / token_elements), rotate_tokens);
  };
  for_cpu_dtype(q.scalar_type(), [&](auto element) {
    if (interleaved) {
      run(element, std::true_type{});
    } else {
      run(element, std::false_type{});
    }
  });
}

std::tuple<Tensor, Tensor> rotary_embedding(const Tensor& q_any, const OptionalTensor& k_any, const Tensor& cos,
                                            const Tensor& sin, const OptionalTensor& positions,
                                            const OptionalTensor& offset, const OptionalTensor& cu_seqlens,
                                            int64_t start, int64_t sequence_dim, bool interleaved, bool inverse) {
  check_rotary(q_any, k_any, cos, sin, sequence_dim);
  const Tensor q = with_dense_heads(q_any), k = with_dense_heads(k_any ? *k_any : q_any);
  Tensor q_out = empty(Sizes(q), q.scalar_type(), q), k_out = k_any ? empty(Sizes(k), k.scalar_type(), k) : nothing(q);
  rotate_all(q, {heads_of(q, q_out), k_any ? heads_of(k, k_out) : Heads{}}, cos, sin, positions, offset, cu_seqlens,
             start, sequence_dim, interleaved, inverse);
  return {q_out, k_out};
}

void rotary_embedding_out(const Tensor& q_any, const Tensor& k_any, Tensor q_out, Tensor k_out, const Tensor& cos,
                          const Tensor& sin, int64_t sequence_dim, bool inverse) {
  check_rotary(q_any, k_any, cos, sin, sequence_dim);
  check_heads_out(q_any, q_out);
  check_heads_out(k_any, k_out);
  const Tensor q = with_dense_heads(q_any), k = with_dense_heads(k_any);
  rotate_all(q, {heads_of(q, q_out), heads_of(k, k_out)}, cos, sin, std::nullopt, std::nullopt, std::nullopt, 0,
             sequence_dim, false, inverse);
}

}  // namespace
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) {
  m.impl("rotary_embedding", TORCH_BOX(&fm::rotary_embedding));
  m.impl("rotary_embedding_out", TORCH_BOX(&fm::rotary_embedding_out));
}

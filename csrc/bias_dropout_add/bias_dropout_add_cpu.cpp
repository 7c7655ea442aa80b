// bias_dropout_add on the CPU: residual + dropout(x + bias), and its gradients.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/column_sums.h"
#include "cpu/multiversion.h"
#include "cpu/numbers.h"
#include "cpu/parameter.h"
#include "cpu/philox_buffer.h"
#include "cpu/streaming.h"
#include "tensor_checks.h"

#include "global_rows.h"

namespace fm {
namespace {

// The factors of elements: scale if the random number is not below threshold, else 0. Without numbers: scale.
struct Dropout {
  const RandomHalf* numbers;
  uint32_t threshold;
  float scale;
};

template <typename TX, typename T>
FM_INLINE void forward_segment(const TX* __restrict x, const float* __restrict bias, const T* __restrict residual,
                               T* __restrict y, const Dropout& dropout, int64_t n) {
  const RandomHalf* __restrict numbers = dropout.numbers;
  const uint32_t threshold = dropout.threshold;
  const float scale = dropout.scale;
  if (numbers == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      y[i] = from_float<T>(to_float(residual[i]) + (to_float(x[i]) + bias[i]) * scale);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float factor = numbers[i] >= threshold ? scale : 0.0f;
      y[i] = from_float<T>(to_float(residual[i]) + (to_float(x[i]) + bias[i]) * factor);
    }
  }
}

template <typename TX, typename T, bool kRandom, bool kDx, bool kSums>
FM_INLINE void backward_loop(const T* __restrict dy, TX* __restrict dx, float* __restrict sums, const Dropout& dropout,
                             int64_t n) {
  const RandomHalf* __restrict numbers = dropout.numbers;
  const uint32_t threshold = dropout.threshold;
  const float scale = dropout.scale;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float grad = to_float(dy[i]);
    if constexpr (kRandom) {
      grad *= numbers[i] >= threshold ? scale : 0.0f;
    } else {
      grad *= scale;
    }
    if constexpr (kSums) sums[i] += grad;
    if constexpr (kDx) dx[i] = from_float<TX>(grad);
  }
}

template <typename TX, typename T, bool kRandom>
FM_INLINE void backward_segment(const T* dy, TX* dx, float* sums, const Dropout& dropout, int64_t n) {
  if (dx != nullptr && sums != nullptr) {
    backward_loop<TX, T, kRandom, true, true>(dy, dx, sums, dropout, n);
  } else if (dx != nullptr) {
    backward_loop<TX, T, kRandom, true, false>(dy, dx, sums, dropout, n);
  } else {
    backward_loop<TX, T, kRandom, false, true>(dy, dx, sums, dropout, n);
  }
}

// target_clones takes no templates, so every combination is a plain function.
#define FM_BIAS_DROPOUT_ADD(TX, T)                                                                                   \
  FM_MULTIVERSION void forward(const TX* x, const float* bias, const T* residual, T* y, const Dropout& dropout,      \
                               int64_t n) {                                                                          \
    forward_segment<TX, T>(x, bias, residual, y, dropout, n);                                                        \
  }                                                                                                                  \
  FM_MULTIVERSION void backward(const T* dy, TX* dx, float* sums, const Dropout& dropout, int64_t n) {               \
    if (dropout.numbers != nullptr) {                                                                                  \
      backward_segment<TX, T, true>(dy, dx, sums, dropout, n);                                                       \
    } else {                                                                                                         \
      backward_segment<TX, T, false>(dy, dx, sums, dropout, n);                                                      \
    }                                                                                                                \
  }
FM_BIAS_DROPOUT_ADD(float, float)
FM_BIAS_DROPOUT_ADD(BFloat16, BFloat16)
FM_BIAS_DROPOUT_ADD(Float16, Float16)
FM_BIAS_DROPOUT_ADD(BFloat16, float)
FM_BIAS_DROPOUT_ADD(Float16, float)
#undef FM_BIAS_DROPOUT_ADD

// Calls f(TX{}, T{}) with the types of x and of residual.
template <typename F>
void for_dtypes(ScalarType x, ScalarType residual, const F& f) {
  STD_TORCH_CHECK(x == residual || residual == ScalarType::Float, "residual must have the dtype of x or be float32");
  for_cpu_dtype(x, [&]<typename TX>(TX element) {
    if (x == residual) {
      f(element, element);
    } else {
      f(element, float{});
    }
  });
}

constexpr int64_t kColumnBlock = PhiloxBuffer::kElements;
constexpr int64_t kGrainElements = 16384;

// x as [rows, width]. Without a bias and a slice the width is free, and rows are kColumnBlock long.
struct Layout {
  int64_t rows, width;
  Layout(const Tensor& x, bool has_bias, const GlobalRows& global) {
    const int64_t count = x.numel(), last = x.dim() > 0 ? x.size(x.dim() - 1) : 1;
    width = has_bias || global.inner != 0 ? last : std::max<int64_t>(1, std::min(count, kColumnBlock));
    rows = width > 0 ? (count + width - 1) / width : 0;
  }
};

// The dropout of one call: returns the factors of a segment of a row.
class Mask {
 public:
  Mask(const OptionalTensor& rng_state, double p, const GlobalRows& rows) : rows_(rows) {
    random_ = p > 0.0 && p < 1.0;
    STD_TORCH_CHECK(!random_ || (rng_state && rng_state->scalar_type() == ScalarType::Long && rng_state->numel() == 2 &&
                                 rng_state->is_contiguous()),
                    "rng_state must be two int64");
    if (random_) stream_ = philox_stream(static_cast<const int64_t*>(rng_state->const_data_ptr()));
    dropout_ = {nullptr, dropout_threshold(p), dropout_scale(p)};
  }
  Dropout segment(PhiloxBuffer& buffer, int64_t row, int64_t column, int64_t width, int64_t n) const {
    Dropout dropout = dropout_;
    if (random_) dropout.numbers = buffer.halves(stream_, first_index(rows_, row, width) + column, n);
    return dropout;
  }

 private:
  GlobalRows rows_;
  PhiloxStream stream_{};
  Dropout dropout_;
  bool random_;
};

// Destination of the results of a segment. Results of large tensors go to a buffer first, from which they are streamed
// past the caches.
template <typename T>
class SegmentTarget {
 public:
  explicit SegmentTarget(int64_t count) : large_(count * static_cast<int64_t>(sizeof(T)) >= kStreamFromBytes) {}
  T* begin(T* result, int64_t n) {
    streamed_ = large_ && is_line_aligned(result) && n * static_cast<int64_t>(sizeof(T)) % kLineBytes == 0;
    return streamed_ ? buffer_ : result;
  }
  void end(T* result, int64_t n) const {
    if (streamed_) stream_copy(result, buffer_, n * static_cast<int64_t>(sizeof(T)));
  }
  void finish() const {
    if (large_) finish_streaming();
  }

 private:
  alignas(64) T buffer_[kColumnBlock];
  bool large_, streamed_ = false;
};

Tensor bias_dropout_add_forward(const Tensor& x_any, const OptionalTensor& bias_any, const Tensor& residual_any,
                                const OptionalTensor& rng_state, double p, int64_t inner, int64_t start,
                                int64_t stride0, int64_t stride1) {
  check_kernel_dtype(x_any, "x");
  STD_TORCH_CHECK(residual_any.numel() == x_any.numel() && on_same_device(residual_any, x_any),
                  "residual must have the shape and device of x");
  const Tensor x = made_contiguous(x_any), residual = made_contiguous(residual_any);
  const OptionalTensor bias = checked_parameter(bias_any, x, "bias");
  Tensor y = empty(Sizes(residual), residual.scalar_type(), residual);
  const int64_t count = x.numel();
  const GlobalRows global{inner, start, stride0, stride1};
  const Mask mask(rng_state, p, global);
  if (count == 0) return y;
  const Layout layout(x, bias.has_value(), global);
  const int64_t width = layout.width;
  const FloatParameter bias_float(bias, std::min(width, bias ? width : kColumnBlock), 0.0f);
  for_dtypes(x.scalar_type(), residual.scalar_type(), [&]<typename TX, typename T>(TX, T) {
    const TX* x_data = static_cast<const TX*>(x.const_data_ptr());
    const T* residual_data = static_cast<const T*>(residual.const_data_ptr());
    T* y_data = static_cast<T*>(y.mutable_data_ptr());
    torch::stable::parallel_for(0, count, kGrainElements, [&](int64_t begin, int64_t end) {
      PhiloxBuffer buffer;
      SegmentTarget<T> target(count);
      for (int64_t i = begin; i < end;) {
        const int64_t row = i / width, column = i % width;
        const int64_t n = std::min({width - column, end - i, kColumnBlock});
        T* to = target.begin(y_data + i, n);
        forward(x_data + i, bias_float.data() + (bias ? column : 0), residual_data + i, to,
                mask.segment(buffer, row, column, width, n), n);
        target.end(y_data + i, n);
        i += n;
      }
      target.finish();
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_dropout_add_backward(const Tensor& dy_any, const OptionalTensor& bias_any,
                                                     const OptionalTensor& rng_state, ScalarType x_dtype, double p,
                                                     int64_t inner, int64_t start, int64_t stride0, int64_t stride1,
                                                     bool need_dx, bool need_dbias) {
  check_kernel_dtype(dy_any, "dy");
  const Tensor dy = made_contiguous(dy_any);
  const OptionalTensor bias = checked_parameter(bias_any, dy, "bias");
  need_dbias = need_dbias && bias.has_value();
  const int64_t zero = 0;
  Tensor dx = need_dx ? empty(Sizes(dy), x_dtype, dy) : empty({&zero, 1}, x_dtype, dy);
  Tensor dbias = need_dbias ? empty(Sizes(*bias), bias->scalar_type(), dy) : nothing(dy);
  const int64_t count = dy.numel();
  const GlobalRows global{inner, start, stride0, stride1};
  const Mask mask(rng_state, p, global);
  const Layout layout(dy, bias.has_value(), global);
  const int64_t rows = layout.rows, width = layout.width;
  const int64_t parts = row_parts(rows), blocks = (width + kColumnBlock - 1) / kColumnBlock;
  const Scratch partials = make_scratch(need_dbias ? parts * width : 0);
  for_dtypes(x_dtype, dy.scalar_type(), [&]<typename TX, typename T>(TX, T) {
    if (!need_dx && !need_dbias) return;
    const T* dy_data = static_cast<const T*>(dy.const_data_ptr());
    TX* dx_data = need_dx ? static_cast<TX*>(dx.mutable_data_ptr()) : nullptr;
    const int64_t elements_per_task = std::max<int64_t>(1, count / std::max<int64_t>(1, parts * blocks));
    const int64_t grain = std::max<int64_t>(1, kGrainElements / elements_per_task);
    torch::stable::parallel_for(0, parts * blocks, grain, [&](int64_t first, int64_t last) {
      PhiloxBuffer buffer;
      SegmentTarget<TX> target(need_dx ? count : 0);
      for (int64_t task = first; task < last; ++task) {
        const int64_t part = task / blocks, column = task % blocks * kColumnBlock;
        const int64_t columns = std::min(kColumnBlock, width - column);
        float* sums = need_dbias ? partials.get() + part * width + column : nullptr;
        if (need_dbias) std::fill(sums, sums + columns, 0.0f);
        for (int64_t row = part_begin(part, parts, rows); row < part_begin(part + 1, parts, rows); ++row) {
          const int64_t i = row * width + column;
          const int64_t n = std::min(columns, count - i);  // the last row may be short if the width is free
          TX* to = need_dx ? target.begin(dx_data + i, n) : nullptr;
          backward(dy_data + i, to, sums, mask.segment(buffer, row, column, width, n), n);
          if (need_dx) target.end(dx_data + i, n);
        }
      }
      target.finish();
    });
  });
  if (need_dbias) {
    for_cpu_dtype(bias->scalar_type(), [&]<typename T>(T) {
      T* out = static_cast<T*>(dbias.mutable_data_ptr());
      finish_column_sums(partials.get(), parts, width, width, [&](int64_t j, float sum) { out[j] = from_float<T>(sum); });
    });
  }
  return {dx, dbias};
}

}  // namespace
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) {
  m.impl("bias_dropout_add_forward", TORCH_BOX(&fm::bias_dropout_add_forward));
  m.impl("bias_dropout_add_backward", TORCH_BOX(&fm::bias_dropout_add_backward));
}

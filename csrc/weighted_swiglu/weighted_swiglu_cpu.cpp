// weighted_swiglu on the CPU: silu(gate) * up * weight of each row, and its gradients.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "activation/cpu.h"
#include "cpu/sum.h"
#include "weighted_swiglu/tensors.h"

namespace fm {
namespace {

// One row; dup and y may be null.
template <typename T>
struct SwigluRow {
  const T *x, *dy;
  T *dx, *y;
  float weight;
  int64_t width;
  bool stream;
};

template <typename T>
FM_INLINE void swiglu_forward_row(const SwigluRow<T>& a) {
  alignas(kLineBytes) T buffer[kActivationChunk];
  for (int64_t begin = 0; begin < a.width; begin += kActivationChunk) {
    const int64_t n = std::min(kActivationChunk, a.width - begin);
    const T *gate = a.x + begin, *up = a.x + a.width + begin;
    T* y = a.stream ? buffer : a.y + begin;
    if (a.stream) {
      prefetch_lines(gate, kForwardAheadBytes, n * sizeof(T));
      prefetch_lines(up, kForwardAheadBytes, n * sizeof(T));
    }
    const float weight = a.weight;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      y[i] = from_float<T>(Silu::at<CpuActivationMath>(to_float(gate[i])).value * to_float(up[i]) * weight);
    }
    if (a.stream) stream_copy(a.y + begin, buffer, n * sizeof(T));
  }
}

// Returns the gradient of the weight.
template <bool kY, typename T>
FM_INLINE float swiglu_backward_row(const SwigluRow<T>& a) {
  alignas(kLineBytes) T buffers[3][kActivationChunk];
  float dweight = 0.0f;
  for (int64_t begin = 0; begin < a.width; begin += kActivationChunk) {
    const int64_t n = std::min(kActivationChunk, a.width - begin);
    const T *gate = a.x + begin, *up = a.x + a.width + begin, *dy = a.dy + begin;
    T* dgate = a.stream ? buffers[0] : a.dx + begin;
    T* dup = a.stream ? buffers[1] : a.dx + a.width + begin;
    T* y = !kY ? nullptr : a.stream ? buffers[2] : a.y + begin;
    if (a.stream) {
      prefetch_lines(gate, 2 * a.width * sizeof(T), n * sizeof(T));
      prefetch_lines(up, 2 * a.width * sizeof(T), n * sizeof(T));
      prefetch_lines(dy, a.width * sizeof(T), n * sizeof(T));
    }
    const float weight = a.weight;
    float sum[1];
    lane_sums<1>(n, sum, [&](int64_t i, float* lane) __attribute__((always_inline)) {
      const ValueAndSlope f = Silu::at<CpuActivationMath>(to_float(gate[i]));
      const float g = to_float(dy[i]), u = to_float(up[i]);
      dgate[i] = from_float<T>(g * u * weight * f.slope);
      dup[i] = from_float<T>(g * f.value * weight);
      if constexpr (kY) y[i] = from_float<T>(f.value * u * weight);
      lane[0] += g * f.value * u;
    });
    dweight += sum[0];
    if (a.stream) {
      stream_copy(a.dx + begin, buffers[0], n * sizeof(T));
      stream_copy(a.dx + a.width + begin, buffers[1], n * sizeof(T));
      if constexpr (kY) stream_copy(a.y + begin, buffers[2], n * sizeof(T));
    }
  }
  return dweight;
}

// target_clones takes no templates, so every combination is a plain function.
#define FM_WEIGHTED_SWIGLU(T)                                                                                 \
  FM_MULTIVERSION void forward_row(const SwigluRow<T>& a) { swiglu_forward_row(a); }                          \
  FM_MULTIVERSION float backward_row(const SwigluRow<T>& a) {                                                 \
    return a.y == nullptr ? swiglu_backward_row<false>(a) : swiglu_backward_row<true>(a);                     \
  }
FM_WEIGHTED_SWIGLU(float)
FM_WEIGHTED_SWIGLU(BFloat16)
FM_WEIGHTED_SWIGLU(Float16)
#undef FM_WEIGHTED_SWIGLU

int64_t rows_per_thread(int64_t width) { return (kActivationGrain + width) / std::max<int64_t>(1, width); }

Tensor weighted_swiglu_forward(const Tensor& x_any, const Tensor& weight_any) {
  const auto [x, weight, y] = weighted_swiglu_forward_tensors(x_any, weight_any);
  const int64_t rows = y.size(0), width = y.size(1);
  const auto* weights = static_cast<const float*>(weight.const_data_ptr());
  for_cpu_dtype(x.scalar_type(), [&, &x = x, &y = y]<typename T>(T) {
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    const bool stream = streams<T>(to, rows * width, width);
    torch::stable::parallel_for(0, rows, rows_per_thread(width), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        forward_row(SwigluRow<T>{from + 2 * row * width, nullptr, nullptr, to + row * width, weights[row], width, stream});
      }
      if (stream) finish_streaming();
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> weighted_swiglu_backward(const Tensor& dy_any, const Tensor& x_any,
                                                            const Tensor& weight_any, bool need_y) {
  const auto t = weighted_swiglu_backward_tensors(dy_any, x_any, weight_any, need_y);
  const int64_t rows = t.dy.size(0), width = t.dy.size(1);
  const auto* weights = static_cast<const float*>(t.weight.const_data_ptr());
  auto* dweights = static_cast<float*>(t.dweight.mutable_data_ptr());
  for_cpu_dtype(t.x.scalar_type(), [&]<typename T>(T) {
    const T* dy = static_cast<const T*>(t.dy.const_data_ptr());
    const T* x = static_cast<const T*>(t.x.const_data_ptr());
    T* dx = static_cast<T*>(t.dx.mutable_data_ptr());
    T* y = need_y ? static_cast<T*>(t.y.mutable_data_ptr()) : nullptr;
    const bool stream = streams<T>(dx, rows * width, width) && (y == nullptr || is_line_aligned(y));
    torch::stable::parallel_for(0, rows, rows_per_thread(width), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        dweights[row] = backward_row(SwigluRow<T>{x + 2 * row * width, dy + row * width, dx + 2 * row * width,
                                                  y == nullptr ? nullptr : y + row * width, weights[row], width, stream});
      }
      if (stream) finish_streaming();
    });
  });
  return {t.dx, t.dweight, t.y};
}

}  // namespace
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) {
  m.impl("weighted_swiglu_forward", TORCH_BOX(&fm::weighted_swiglu_forward));
  m.impl("weighted_swiglu_backward", TORCH_BOX(&fm::weighted_swiglu_backward));
}

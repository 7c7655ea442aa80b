// bias_gelu, bias_swiglu and bias_geglu on the CPU: the loops over rows, and the functions from tensors to tensors.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <tuple>

#include "activation/functions.h"
#include "activation/tensors.h"
#include "cpu/column_sums.h"
#include "cpu/multiversion.h"
#include "cpu/numbers.h"
#include "cpu/parameter.h"
#include "cpu/streaming.h"

namespace fm {

// Arithmetic that compilers vectorise.
struct CpuActivationMath {
  static constexpr bool kUnderflows = false;
  // Integers: magnitudes are ordered as their bits are, and compilers recognise a minimum.
  static FM_INLINE float clamp(float u, float limit) {
    const uint32_t bits = std::bit_cast<uint32_t>(u);
    const int32_t magnitude = static_cast<int32_t>(bits & 0x7FFFFFFFu), most = std::bit_cast<int32_t>(limit);
    return std::bit_cast<float>(static_cast<uint32_t>(magnitude < most ? magnitude : most) | (bits & 0x80000000u));
  }

  static FM_INLINE float exp2(float w) {
    constexpr float kRound = 12582912.0f;  // adding 1.5 * 2^23 leaves the nearest integer in the low bits
    const float shifted = w + kRound;
    const float f = w - (shifted - kRound);
    // The polynomial with p(0) = 1 of least maximal relative error (2^-29) on [-1/2, 1/2].
    float p = 0.00015353362f;
    p = p * f + 0.0013398875f;
    p = p * f + 0.00961843692f;
    p = p * f + 0.0555033237f;
    p = p * f + 0.240226477f;
    p = p * f + 0.693147182f;
    p = p * f + 1.0f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23));
  }

  static FM_INLINE float reciprocal(float x) { return 1.0f / x; }
};

// Some columns of one row. Index 1: the second half of a gated activation.
template <typename T>
struct ActivationRow {
  const T* x[kMaxHalves];
  const float* bias[kMaxHalves];
  const T* dy;              // backward
  T* out[kMaxHalves];       // y, or dx; null: dx is not wanted
  float* sums[kMaxHalves];  // null: dbias is not wanted
  int64_t n;
  int64_t ahead_x, ahead_dy;  // bytes from the current read to the prefetched address
  bool stream;
};

// Elements of one chunk: its inputs, the prefetched inputs of the next row, and the results before they are streamed
// out fit the first-level cache together.
inline constexpr int64_t kActivationChunk = 256;
inline constexpr int64_t kActivationColumns = 1024;
inline constexpr int64_t kForwardAheadBytes = 4096;
inline constexpr int64_t kActivationGrain = 16384;  // least number of elements for a thread

template <typename Activation, bool kGated, typename T>
FM_INLINE void activation_forward_row(const ActivationRow<T>& a) {
  alignas(kLineBytes) T buffer[kActivationChunk];
  for (int64_t begin = 0; begin < a.n; begin += kActivationChunk) {
    const int64_t n = std::min(kActivationChunk, a.n - begin);
    const T *u = a.x[0] + begin, *v = kGated ? a.x[1] + begin : nullptr;
    const float *b = a.bias[0] + begin, *c = kGated ? a.bias[1] + begin : nullptr;
    T* y = a.stream ? buffer : a.out[0] + begin;
    if (a.stream) {
      prefetch_lines(u, a.ahead_x, n * sizeof(T));
      if (kGated) prefetch_lines(v, a.ahead_x, n * sizeof(T));
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      float value = Activation::template at<CpuActivationMath>(to_float(u[i]) + b[i]).value;
      if constexpr (kGated) value *= to_float(v[i]) + c[i];
      y[i] = from_float<T>(value);
    }
    if (a.stream) stream_copy(a.out[0] + begin, buffer, n * sizeof(T));
  }
}

template <typename Activation, bool kGated, bool kDx, bool kSums, typename T>
FM_INLINE void activation_backward_row(const ActivationRow<T>& a) {
  alignas(kLineBytes) T buffer[kHalves<kGated>][kActivationChunk];
  for (int64_t begin = 0; begin < a.n; begin += kActivationChunk) {
    const int64_t n = std::min(kActivationChunk, a.n - begin);
    const T *u = a.x[0] + begin, *v = kGated ? a.x[1] + begin : nullptr, *dy = a.dy + begin;
    const float *b = a.bias[0] + begin, *c = kGated ? a.bias[1] + begin : nullptr;
    T* du = !kDx ? nullptr : a.stream ? buffer[0] : a.out[0] + begin;
    T* dv = !kDx || !kGated ? nullptr : a.stream ? buffer[kHalves<kGated> - 1] : a.out[1] + begin;
    float *sum_u = kSums ? a.sums[0] + begin : nullptr, *sum_v = kSums && kGated ? a.sums[1] + begin : nullptr;
    if (a.stream) {
      prefetch_lines(u, a.ahead_x, n * sizeof(T));
      if (kGated) prefetch_lines(v, a.ahead_x, n * sizeof(T));
      prefetch_lines(dy, a.ahead_dy, n * sizeof(T));
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const ValueAndSlope f = Activation::template at<CpuActivationMath>(to_float(u[i]) + b[i]);
      const float g = to_float(dy[i]);
      float gradient = g * f.slope;
      if constexpr (kGated) {
        gradient *= to_float(v[i]) + c[i];
        if constexpr (kDx) dv[i] = from_float<T>(g * f.value);
        if constexpr (kSums) sum_v[i] += g * f.value;
      }
      if constexpr (kDx) du[i] = from_float<T>(gradient);
      if constexpr (kSums) sum_u[i] += gradient;
    }
    if (kDx && a.stream) {
      for (int half = 0; half < kHalves<kGated>; ++half) {
        stream_copy(a.out[half] + begin, buffer[half], n * sizeof(T));
      }
    }
  }
}

// target_clones takes no templates, so every combination is a plain function, and a struct of overloads finds it.
#define FM_ACTIVATION_KERNELS_FOR(Activation, kGated, T)                                                     \
  FM_MULTIVERSION void forward_##Activation(const ActivationRow<T>& a) {                                     \
    activation_forward_row<Activation, kGated>(a);                                                           \
  }                                                                                                          \
  FM_MULTIVERSION void backward_##Activation(const ActivationRow<T>& a) {                                    \
    if (a.out[0] == nullptr) return activation_backward_row<Activation, kGated, false, true>(a);             \
    if (a.sums[0] == nullptr) return activation_backward_row<Activation, kGated, true, false>(a);            \
    activation_backward_row<Activation, kGated, true, true>(a);                                              \
  }
#define FM_ACTIVATION_KERNELS(Activation, kIsGated)                                                          \
  FM_ACTIVATION_KERNELS_FOR(Activation, kIsGated, float)                                                     \
  FM_ACTIVATION_KERNELS_FOR(Activation, kIsGated, BFloat16)                                                  \
  FM_ACTIVATION_KERNELS_FOR(Activation, kIsGated, Float16)                                                   \
  struct Activation##Kernels {                                                                               \
    static constexpr bool kGated = kIsGated;                                                                 \
    template <typename T>                                                                                    \
    static void forward(const ActivationRow<T>& a) {                                                         \
      forward_##Activation(a);                                                                               \
    }                                                                                                        \
    template <typename T>                                                                                    \
    static void backward(const ActivationRow<T>& a) {                                                        \
      backward_##Activation(a);                                                                              \
    }                                                                                                        \
  };

// Whether to write past the caches. Rows must begin at cache lines, too.
template <typename T>
bool streams(void* out, int64_t count, int64_t width) {
  return count * static_cast<int64_t>(sizeof(T)) >= kStreamFromBytes && is_line_aligned(out) &&
         width * sizeof(T) % kLineBytes == 0;
}

template <typename Kernels>
Tensor activation_forward(const Tensor& x, const OptionalTensor& bias) {
  constexpr int64_t kParts = kHalves<Kernels::kGated>;
  const auto t = activation_forward_tensors<Kernels::kGated>(x, bias);
  const auto [count, width, rows] = activation_layout<Kernels::kGated>(t.x, bias.has_value(), kActivationColumns);
  if (count == 0) return t.y;
  const FloatParameter b(t.bias, kParts * width, 0.0f);
  for_cpu_dtype(t.x.scalar_type(), [&]<typename T>(T) {
    const T* from = static_cast<const T*>(t.x.const_data_ptr());
    T* to = static_cast<T*>(t.y.mutable_data_ptr());
    const bool stream = streams<T>(to, count, width);
    const int64_t grain = (kActivationGrain + width - 1) / width;
    torch::stable::parallel_for(0, rows, grain, [&, count = count, width = width](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        ActivationRow<T> a{};
        for (int64_t half = 0; half < kParts; ++half) {
          a.x[half] = from + (kParts * row + half) * width;
          a.bias[half] = b.data() + half * width;
        }
        a.out[0] = to + row * width;
        a.n = std::min(width, count - row * width);
        a.ahead_x = kForwardAheadBytes;
        a.stream = stream;
        Kernels::forward(a);
      }
      if (stream) finish_streaming();
    });
  });
  return t.y;
}

template <typename Kernels>
std::tuple<Tensor, Tensor> activation_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& bias,
                                               bool need_dx, bool need_dbias) {
  constexpr int64_t kParts = kHalves<Kernels::kGated>;
  const auto t = activation_backward_tensors<Kernels::kGated>(dy, x, bias, need_dx, need_dbias);
  const auto [count, width, rows] = activation_layout<Kernels::kGated>(t.x, bias.has_value(), kActivationColumns);
  const FloatParameter b(t.bias, kParts * width, 0.0f);
  const int64_t parts = row_parts(rows), blocks = (width + kActivationColumns - 1) / kActivationColumns;
  const Scratch partials = make_scratch(t.need_dbias ? parts * kParts * width : 0);
  const int64_t grain = std::max<int64_t>(1, kActivationGrain * parts * blocks / std::max<int64_t>(1, count));
  for_cpu_dtype(t.x.scalar_type(), [&, width = width, rows = rows, count = count]<typename T>(T) {
    if (!t.need_dx && !t.need_dbias) return;
    const T* dy_data = static_cast<const T*>(t.dy.const_data_ptr());
    const T* x_data = static_cast<const T*>(t.x.const_data_ptr());
    T* dx_data = t.need_dx ? static_cast<T*>(t.dx.mutable_data_ptr()) : nullptr;
    const bool stream = t.need_dx && streams<T>(dx_data, count, width);
    torch::stable::parallel_for(0, parts * blocks, grain, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t part = task / blocks, column = task % blocks * kActivationColumns;
        const int64_t columns = std::min(kActivationColumns, width - column);
        ActivationRow<T> a{};
        a.stream = stream;
        a.ahead_x = kParts * width * sizeof(T);
        a.ahead_dy = width * sizeof(T);
        for (int64_t half = 0; half < kParts; ++half) {
          a.bias[half] = b.data() + half * width + column;
          if (!t.need_dbias) continue;
          a.sums[half] = partials.get() + (part * kParts + half) * width + column;
          std::fill(a.sums[half], a.sums[half] + columns, 0.0f);
        }
        for (int64_t row = part_begin(part, parts, rows); row < part_begin(part + 1, parts, rows); ++row) {
          a.dy = dy_data + row * width + column;
          for (int64_t half = 0; half < kParts; ++half) {
            const int64_t i = (kParts * row + half) * width + column;
            a.x[half] = x_data + i;
            a.out[half] = t.need_dx ? dx_data + i : nullptr;
          }
          a.n = std::min(columns, count - row * width - column);  // the last row may be short
          Kernels::backward(a);
        }
      }
      if (stream) finish_streaming();
    });
  });
  if (t.need_dbias) {
    for_cpu_dtype(t.bias->scalar_type(), [&, width = width]<typename T>(T) {
      T* out = static_cast<T*>(t.dbias.mutable_data_ptr());
      finish_column_sums(partials.get(), parts, kParts * width, kParts * width,
                         [&](int64_t j, float sum) { out[j] = from_float<T>(sum); });
    });
  }
  return {t.dx, t.dbias};
}

}  // namespace fm

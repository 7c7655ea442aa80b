// layer_norm (kCentred) and rms_norm on the CPU: the functions from tensors to tensors.
#pragma once

#include <algorithm>

#include "cpu/column_sums.h"
#include "cpu/parameter.h"
#include "norm/cpu_rows.h"
#include "norm/inputs.h"

namespace fm {

// target_clones takes no templates, so every pair of dtypes is a plain function, found by its argument. The functions
// are static, since layer_norm and rms_norm each have their own.
#define FM_NORM_ROWS(T, S, kCentred)                                                                              \
  FM_MULTIVERSION static void run_rows(const NormForwardRows<T, S, kCentred>& a) { normalise_rows(a); }          \
  FM_MULTIVERSION static void run_rows(const NormBackwardRows<T, S, kCentred>& a) { backward_rows(a); }
#define FM_NORM_CPU_KERNELS(kCentred)         \
  FM_NORM_ROWS(float, float, kCentred)        \
  FM_NORM_ROWS(BFloat16, BFloat16, kCentred)  \
  FM_NORM_ROWS(Float16, Float16, kCentred)    \
  FM_NORM_ROWS(BFloat16, float, kCentred)     \
  FM_NORM_ROWS(Float16, float, kCentred)

inline constexpr int64_t kNormGrainElements = 16384;

// Calls f(T{}, S{}) with the types of the dtypes.
template <typename F>
void for_norm_dtypes(ScalarType dtype, ScalarType stream, const F& f) {
  for_cpu_dtype(dtype, [&]<typename T>(T value) {
    if (stream == dtype) {
      f(value, value);
    } else if constexpr (!std::is_same_v<T, float>) {
      f(value, float{});
    }
  });
}

// The factors of a normalised row, as float32.
class NormWeight {
 public:
  NormWeight(const OptionalTensor& weight, int64_t width, bool zero_centered) : weight_(weight, width, 1.0f) {
    if (!weight || !zero_centered) return;
    shifted_ = make_scratch(width);
    for (int64_t i = 0; i < width; ++i) shifted_[i] = 1.0f + weight_.data()[i];
  }
  const float* data() const { return shifted_ ? shifted_.get() : weight_.data(); }

 private:
  FloatParameter weight_;
  Scratch shifted_;
};

template <typename T>
const T* data_of(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

struct NormForwardOutputs {
  Tensor y, mean, rstd, total;
};

template <bool kCentred>
NormForwardOutputs norm_forward_cpu(const NormForwardInputs& in, double eps, bool zero_centered_weight) {
  const Tensor& x = in.x;
  const int64_t width = in.width;
  const Sizes row_sizes(x, 1);
  Tensor y = empty(Sizes(x), x.scalar_type(), x), rstd = empty(row_sizes, ScalarType::Float, x);
  Tensor mean = kCentred ? empty(row_sizes, ScalarType::Float, x) : rstd;
  Tensor total = in.residual ? empty(Sizes(x), in.residual->scalar_type(), x) : nothing(x);
  const NormWeight weight(in.weight, width, zero_centered_weight);
  const FloatParameter bias(in.bias, kCentred ? width : 0, 0.0f);
  float* means = static_cast<float*>(mean.mutable_data_ptr());
  float* rstds = static_cast<float*>(rstd.mutable_data_ptr());
  for_norm_dtypes(x.scalar_type(), total.scalar_type(), [&]<typename T, typename S>(T, S) {
    const T* x_data = static_cast<const T*>(x.const_data_ptr());
    const S* residual = data_of<S>(in.residual);
    T* y_data = static_cast<T*>(y.mutable_data_ptr());
    S* total_data = residual == nullptr ? nullptr : static_cast<S*>(total.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, kNormGrainElements / width);
    torch::stable::parallel_for(0, in.rows, grain, [&](int64_t first, int64_t last) {
      const int64_t at = first * width;
      run_rows(NormForwardRows<T, S, kCentred>{
          x_data + at, residual == nullptr ? nullptr : residual + at, weight.data(), bias.data(), y_data + at,
          residual == nullptr ? nullptr : total_data + at, means + first, rstds + first, last - first, width,
          static_cast<float>(eps)});
    });
  });
  return {y, mean, rstd, total};
}

struct NormBackwardOutputs {
  Tensor dx, dweight, dbias, dresidual;
};

template <bool kCentred>
NormBackwardOutputs norm_backward_cpu(const NormBackwardInputs& in, bool need_dx, bool need_dweight, bool need_dbias,
                                      bool need_dresidual, bool zero_centered_weight) {
  const Tensor &x = in.x, &dy = in.dy;
  const int64_t rows = in.rows, width = in.width;
  need_dweight = need_dweight && in.weight.has_value();
  need_dbias = need_dbias && in.bias.has_value();
  const bool need_sums = need_dweight || need_dbias;
  Tensor dx = need_dx ? empty(Sizes(x), dy.scalar_type(), x) : nothing(dy);
  Tensor dweight = need_dweight ? empty(Sizes(*in.weight), in.weight->scalar_type(), x) : nothing(dy);
  Tensor dbias = need_dbias ? empty(Sizes(*in.bias), in.bias->scalar_type(), x) : nothing(dy);
  Tensor dresidual = need_dresidual ? empty(Sizes(x), x.scalar_type(), x) : nothing(x);
  if (!need_dx && !need_dresidual && !need_sums) return {dx, dweight, dbias, dresidual};

  const NormWeight weight(in.weight, width, zero_centered_weight);
  const float* means = data_of<float>(in.mean);
  const float* rstds = static_cast<const float*>(in.rstd.const_data_ptr());
  constexpr int64_t kSums = kCentred ? 2 : 1;
  const int64_t parts = row_parts(rows);
  // For every part: one row of partial sums of dweight, then one of dbias.
  const Scratch partials = make_scratch(need_sums ? kSums * parts * width : 0);
  for_norm_dtypes(dy.scalar_type(), x.scalar_type(), [&]<typename T, typename S>(T, S) {
    const T* dy_data = static_cast<const T*>(dy.const_data_ptr());
    const S* x_data = static_cast<const S*>(x.const_data_ptr());
    const S* dtotal = data_of<S>(in.dtotal);
    T* dx_data = need_dx ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr;
    S* dresidual_data = need_dresidual ? static_cast<S*>(dresidual.mutable_data_ptr()) : nullptr;
    const auto from = [](auto* data, int64_t at) { return data == nullptr ? data : data + at; };
    const int64_t grain = std::max<int64_t>(1, kNormGrainElements / std::max<int64_t>(1, x.numel() / parts));
    torch::stable::parallel_for(0, parts, grain, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        const int64_t begin = part_begin(part, parts, rows), end = part_begin(part + 1, parts, rows);
        float* sums = need_sums ? partials.get() + kSums * part * width : nullptr;
        if (need_sums) std::fill(sums, sums + kSums * width, 0.0f);
        const int64_t at = begin * width;
        run_rows(NormBackwardRows<T, S, kCentred>{dy_data + at, x_data + at, from(dtotal, at), weight.data(),
                                                  from(means, begin), rstds + begin, from(dx_data, at),
                                                  from(dresidual_data, at), sums, from(sums, width), end - begin,
                                                  width});
      }
    });
  });
  const auto finish = [&](const Tensor& sums_out, int64_t offset) {
    for_cpu_dtype(sums_out.scalar_type(), [&]<typename T>(T) {
      T* out = static_cast<T*>(sums_out.mutable_data_ptr());
      finish_column_sums(partials.get() + offset, parts, width, kSums * width,
                         [&](int64_t j, float sum) { out[j] = from_float<T>(sum); });
    });
  };
  if (need_dweight) finish(dweight, 0);
  if (need_dbias) finish(dbias, width);
  return {dx, dweight, dbias, dresidual};
}

}  // namespace fm

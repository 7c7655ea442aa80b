// AdamW over lists of float32 tensors on the CPU: one pass over gradient, weight and moments.

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

#include "cpu/multiversion.h"
#include "cpu/numbers.h"
#include "cpu/parameter.h"

#include "checks.h"
#include "update.h"

namespace fm {
namespace {

// The elements of one task; `low` is null where the main weight is the parameter itself.
template <typename T>
struct Span {
  float *main, *first, *second, *gradient;
  T* low;
  int64_t count;
};

template <typename T, bool kLow, bool kZero>
FM_INLINE void update_loop(const Span<T>& span, const AdamwFactors& factors, float gradient_scale) {
  float* __restrict main = span.main;
  float* __restrict first = span.first;
  float* __restrict second = span.second;
  float* __restrict gradient = span.gradient;
  T* __restrict low = span.low;
  const AdamwFactors f = factors;
#pragma omp simd
  for (int64_t i = 0; i < span.count; ++i) {
    float w = main[i], m = first[i], v = second[i];
    adamw_element(f, gradient_scale, gradient[i], w, m, v);
    main[i] = w;
    first[i] = m;
    second[i] = v;
    if constexpr (kLow) low[i] = from_float<T>(w);
    if constexpr (kZero) gradient[i] = 0.0f;
  }
}

// target_clones takes no templates, so every combination is a plain function.
#define FM_ADAMW(T)                                                                                           \
  FM_MULTIVERSION void update(const Span<T>& span, const AdamwFactors& factors, float scale, bool zero) {     \
    if (span.low != nullptr) {                                                                                \
      zero ? update_loop<T, true, true>(span, factors, scale) : update_loop<T, true, false>(span, factors, scale);   \
    } else {                                                                                                  \
      zero ? update_loop<T, false, true>(span, factors, scale) : update_loop<T, false, false>(span, factors, scale); \
    }                                                                                                         \
  }
FM_ADAMW(float)
FM_ADAMW(BFloat16)
FM_ADAMW(Float16)
#undef FM_ADAMW

constexpr int64_t kGrainElements = 16384;

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

void adamw_(std::vector<Tensor> main, std::vector<Tensor> first, std::vector<Tensor> second,
            std::vector<Tensor> gradient, std::vector<Tensor> low, Tensor gradient_scale, OptionalTensor skip, double lr,
            double beta1, double beta2, double eps, double weight_decay, int64_t step, bool zero_gradient) {
  check_adamw(main, first, second, gradient, low, gradient_scale, skip);
  if (skip && *static_cast<const bool*>(skip->const_data_ptr())) return;
  const AdamwFactors factors(lr, beta1, beta2, eps, weight_decay, static_cast<double>(step));
  const float scale = *static_cast<const float*>(gradient_scale.const_data_ptr());
  for (size_t i = 0; i < main.size(); ++i) {
    for_cpu_dtype(low.empty() ? ScalarType::Float : low[i].scalar_type(), [&]<typename T>(T) {
      const Span<T> whole{floats(main[i]), floats(first[i]), floats(second[i]), floats(gradient[i]),
                          low.empty() ? nullptr : static_cast<T*>(low[i].mutable_data_ptr()), main[i].numel()};
      torch::stable::parallel_for(0, whole.count, kGrainElements, [&](int64_t begin, int64_t end) {
        update(Span<T>{whole.main + begin, whole.first + begin, whole.second + begin, whole.gradient + begin,
                       whole.low == nullptr ? nullptr : whole.low + begin, end - begin},
               factors, scale, zero_gradient);
      });
    });
  }
}

}  // namespace
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) { m.impl("adamw_", TORCH_BOX(&fm::adamw_)); }

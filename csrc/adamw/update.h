// One element of an AdamW update: the same operations in the same order on the CPU and on the GPU.
//
// Every product and sum is rounded by itself. A fused multiply-add would give other bits on a processor without one, and
// to the elements of a tensor that the vectors of a loop leave over. The CPU file is compiled with -ffp-contract=off.
#pragma once

#include <cmath>

#include "inlining.h"

namespace fm {

// Factors of a step, each rounded from double to float once.
struct AdamwFactors {
  float decay;        // 1 - lr * weight_decay
  float beta1_rest;   // 1 - beta1
  float beta2;
  float beta2_rest;   // 1 - beta2
  float eps;
  float step_size;    // lr / (1 - beta1^step)
  float second_root;  // sqrt(1 - beta2^step)

  AdamwFactors(double lr, double beta1, double beta2_, double eps_, double weight_decay, double step)
      : decay(static_cast<float>(1.0 - lr * weight_decay)),
        beta1_rest(static_cast<float>(1.0 - beta1)),
        beta2(static_cast<float>(beta2_)),
        beta2_rest(static_cast<float>(1.0 - beta2_)),
        eps(static_cast<float>(eps_)),
        step_size(static_cast<float>(lr / (1.0 - std::pow(beta1, step)))),
        second_root(static_cast<float>(std::sqrt(1.0 - std::pow(beta2_, step)))) {}
};

#ifdef __CUDACC__
FM_INLINE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
FM_INLINE float rounded_sum(float a, float b) { return __fadd_rn(a, b); }
FM_INLINE float rounded_quotient(float a, float b) { return __fdiv_rn(a, b); }
FM_INLINE float rounded_root(float a) { return __fsqrt_rn(a); }
#else
FM_INLINE float rounded_product(float a, float b) { return a * b; }
FM_INLINE float rounded_sum(float a, float b) { return a + b; }
FM_INLINE float rounded_quotient(float a, float b) { return a / b; }
FM_INLINE float rounded_root(float a) { return std::sqrt(a); }
#endif

// Updates a weight w and its moments m and v from the gradient g.
FM_INLINE void adamw_element(const AdamwFactors& f, float gradient_scale, float g, float& w, float& m, float& v) {
  g = rounded_product(g, gradient_scale);
  m = rounded_sum(m, rounded_product(rounded_sum(g, -m), f.beta1_rest));
  v = rounded_sum(rounded_product(v, f.beta2), rounded_product(rounded_product(f.beta2_rest, g), g));
  const float divisor = rounded_sum(rounded_quotient(rounded_root(v), f.second_root), f.eps);
  w = rounded_sum(rounded_product(w, f.decay), -rounded_quotient(rounded_product(f.step_size, m), divisor));
}

}  // namespace fm

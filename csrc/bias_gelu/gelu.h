#pragma once

// GELU and its slope, written once for the CPU and the GPU. Whoever includes this has defined FM_GELU (how functions
// are inlined) and, in namespace fm, gelu_exp, gelu_reciprocal and gelu_normal_cdf(u, exp(-u^2 / 2)).
namespace fm {

inline constexpr float kSqrtTwoOverPi = 0.7978845608028654f;
inline constexpr float kCubic = 0.044715f;
inline constexpr float kNormalDensity = 0.3989422804014327f;  // 1 / sqrt(2 pi)

// The logistic form of the tanh form: (1 + tanh k) / 2 = 1 / (1 + exp(-2 k)), which does not cancel for negative k.
FM_GELU float gelu_tanh_gate(float u) {
  return gelu_reciprocal(1.0f + gelu_exp(-2.0f * kSqrtTwoOverPi * (u + kCubic * u * u * u)));
}

template <bool kTanh>
FM_GELU float gelu(float u) {
  if constexpr (kTanh) {
    return u * gelu_tanh_gate(u);
  } else {
    return u * gelu_normal_cdf(u, gelu_exp(-0.5f * u * u));
  }
}

template <bool kTanh>
FM_GELU float gelu_slope(float u) {
  if constexpr (kTanh) {
    // Beyond 30 the gate is exactly 0 or 1, and u^2 would overflow into inf * 0. NaN fails both comparisons and stays.
    float v = u > 30.0f ? 30.0f : u;
    v = v < -30.0f ? -30.0f : v;
    const float gate = gelu_tanh_gate(v);
    const float inner_slope = 2.0f * kSqrtTwoOverPi * (1.0f + 3.0f * kCubic * v * v);
    // u - u: NaN for inf, as torch gives.
    return gate + v * gate * (1.0f - gate) * inner_slope + (u - u);
  } else {
    const float density_exp = gelu_exp(-0.5f * u * u);
    return gelu_normal_cdf(u, density_exp) + u * kNormalDensity * density_exp;
  }
}

}  // namespace fm

#pragma once

// GELU and its slope, written once for the CPU and the GPU. Whoever includes this has defined FM_GELU (how functions
// are inlined) and, in namespace fm, gelu_exp, gelu_reciprocal and gelu_normal_cdf(u, exp(-u^2 / 2)).
namespace fm {

inline constexpr float kSqrtTwoOverPi = 0.7978845608028654f;
inline constexpr float kCubic = 0.044715f;
inline constexpr float kNormalDensity = 0.3989422804014327f;  // 1 / sqrt(2 pi)

// The logistic form of the tanh form: (1 + tanh k) / 2 = 1 / (1 + exp(-2 k)), which does not cancel for negative k.
// This is the exponential in it.
FM_GELU float gelu_tanh_exp(float u) { return gelu_exp(-2.0f * kSqrtTwoOverPi * (u + kCubic * u * u * u)); }

template <bool kTanh>
FM_GELU float gelu(float u) {
  if constexpr (kTanh) {
    return u * gelu_reciprocal(1.0f + gelu_tanh_exp(u));
  } else {
    return u * gelu_normal_cdf(u, gelu_exp(-0.5f * u * u));
  }
}

template <bool kTanh>
FM_GELU float gelu_slope(float u) {
  if constexpr (kTanh) {
    // Beyond 10 the slope is 0 or 1 to 1e-36, and the exponential would overflow into inf * 0. NaN fails both
    // comparisons and stays.
    float v = u > 10.0f ? 10.0f : u;
    v = v < -10.0f ? -10.0f : v;
    const float exp = gelu_tanh_exp(v);
    const float gate = gelu_reciprocal(1.0f + exp);
    const float inner_slope = 2.0f * kSqrtTwoOverPi * (1.0f + 3.0f * kCubic * v * v);
    // exp * gate is 1 - gate without its rounding; u - u makes NaN of inf, as torch does.
    return gate + v * (exp * gate) * gate * inner_slope + (u - u);
  } else {
    const float density_exp = gelu_exp(-0.5f * u * u);
    return gelu_normal_cdf(u, density_exp) + u * kNormalDensity * density_exp;
  }
}

}  // namespace fm

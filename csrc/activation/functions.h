// Activation functions and their slopes, written once for the CPU and the GPU.
//
// Math has the arithmetic in which the CPU and the GPU differ: clamp(u, limit) to [-limit, limit] (any value for NaN),
// exp2(w) for w in [-126, 126], and reciprocal(x). kUnderflows: exp2(w) is 0 for every w below -126.
#pragma once

#include "inlining.h"

namespace fm {

// Both at once: gradients of gated activations need both. The compiler drops the half that is not used.
struct ValueAndSlope {
  float value, slope;
};

// u / (1 + 2^w), where w falls with u. v is u, clamped to limits beyond which 2^w would overflow and the slope is 0 or
// 1 to 1e-36. Below the limits the value is exactly 0 (NaN for -inf, as in torch). inner_slope is minus the slope of w,
// times ln 2.
template <typename Math>
FM_INLINE ValueAndSlope logistic(float u, float v, float w, float inner_slope) {
  const float exp = Math::exp2(w);
  const float gate = Math::reciprocal(1.0f + exp);
  // exp * gate is 1 - gate without its rounding; u - u turns NaN and inf into NaN, as in torch.
  return {u * (exp > 0x1p125f ? 0.0f : gate), gate + v * (exp * gate) * gate * inner_slope + (u - u)};
}

struct Silu {
  template <typename Math>
  static FM_INLINE ValueAndSlope at(float u) {
    constexpr float kLog2E = 1.4426950408889634f;
    const float v = Math::clamp(u, 87.0f);
    return logistic<Math>(u, v, -kLog2E * v, 1.0f);
  }
};

// The tanh form of GELU, by (1 + tanh k) / 2 = 1 / (1 + exp(-2 k)) with k = sqrt(2 / pi) (u + 0.044715 u^3).
struct GeluTanh {
  template <typename Math>
  static FM_INLINE ValueAndSlope at(float u) {
    constexpr float kTwice = 1.5957691216057308f;             // 2 sqrt(2 / pi)
    constexpr float kLinear = -2.302208198144325f;            // -2 sqrt(2 / pi) log2(e)
    constexpr float kCubic = 0.044715f;
    const float v = Math::clamp(u, 10.0f);
    const float square = v * v;
    return logistic<Math>(u, v, v * (kLinear + kLinear * kCubic * square), kTwice + kTwice * 3.0f * kCubic * square);
  }
};

struct GeluErf {
  template <typename Math>
  static FM_INLINE ValueAndSlope at(float u) {
    constexpr float kHalfLog2E = 0.7213475204444817f;
    constexpr float kNormalDensity = 0.3989422804014327f;  // 1 / sqrt(2 pi)
    // Where exp2 underflows to 0 no argument is too small for it, and every use of its result becomes 0 with it.
    const float v = Math::kUnderflows ? u : Math::clamp(u, 12.5f);
    const float exp = Math::exp2(-kHalfLog2E * v * v);
    // erfc(z) / 2 = t P(t) exp(-z^2) with t = 1 / (1 + 0.33 z), z = |v| / sqrt(2). P has the least maximal relative
    // error: 8e-8 for z in [0, 8.9].
    const float t = Math::reciprocal(1.0f + 0.33f * 0.7071067811865476f * (v < 0.0f ? -v : v));
    float p = -0.0679640844f;
    p = p * t + 0.231342733f;
    p = p * t - 0.177717f;
    p = p * t + 0.2062684f;
    p = p * t + 0.0225066841f;
    p = p * t + 0.100961462f;
    p = p * t + 0.0914187059f;
    p = p * t + 0.0931830555f;
    const float half_erfc = !Math::kUnderflows && exp < 0x1p-112f ? 0.0f : p * t * exp;
    const float cdf = v < 0.0f ? half_erfc : 1.0f - half_erfc;
    return {u * cdf, cdf + v * kNormalDensity * exp + (u - u)};
  }
};

}  // namespace fm

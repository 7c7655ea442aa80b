// Routing of one token on the CPU: its scores, the selection of its experts, and the gradient of its logits.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/math.h"
#include "cpu/multiversion.h"
#include "cpu/sum.h"

namespace fm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kTiny = 1e-20f;  // TINY of the reference
constexpr int64_t kExcluded = std::numeric_limits<int64_t>::min();

struct RoutingRule {
  int64_t num_experts, num_selected;
  bool sigmoid, normalize;
  float scale;
  int64_t num_groups, groups_per_token;
};

// Numbers of a token: its largest logit m, the sum of exp(logit - m), and the sum of its scores.
struct RowStatistics {
  float maximum, exp_sum, total;
};

// ---- Scores --------------------------------------------------------------------------------------------------------

// Softmax of a row, and its statistics.
FM_MULTIVERSION void softmax_of_row(const float* x, int64_t n, float* softmax, RowStatistics* statistics) {
  constexpr int kLanes = 16;
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -kInfinity);
  int64_t begin = 0;
  for (; begin + kLanes <= n; begin += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = x[begin + lane] > lanes[lane] ? x[begin + lane] : lanes[lane];  // NaN is never the maximum
    }
  }
  for (; begin < n; ++begin) lanes[0] = std::max(lanes[0], x[begin]);
  const float maximum = *std::max_element(lanes, lanes + kLanes);
  float sum[1];
  lane_sums<1>(n, sum, [&](int64_t e, float* lane) __attribute__((always_inline)) {
    softmax[e] = exp_vectorised(x[e] - maximum);
    lane[0] += softmax[e];
  });
  const float factor = 1.0f / sum[0];
#pragma omp simd
  for (int64_t e = 0; e < n; ++e) softmax[e] *= factor;
  *statistics = {maximum, sum[0], 1.0f};
}

FM_MULTIVERSION float sigmoid_of_row(const float* x, int64_t n, float* scores) {
  float sum[1];
  lane_sums<1>(n, sum, [&](int64_t e, float* lane) __attribute__((always_inline)) {
    scores[e] = 1.0f / (1.0f + exp_vectorised(-x[e]));
    lane[0] += scores[e];
  });
  return sum[0];
}

FM_MULTIVERSION void add_row(const float* values, float factor, int64_t n, float* sums) {
#pragma omp simd
  for (int64_t e = 0; e < n; ++e) sums[e] += values[e] * factor;
}

// ---- Selection -----------------------------------------------------------------------------------------------------

// A key of 64 bits for each value: larger for a larger value, and for a lower index of equal values. NaN counts as
// -inf, and -0 as 0.
FM_INLINE int64_t selection_key(float value, int64_t index, int64_t n) {
  const int32_t bits = std::bit_cast<int32_t>((value == value ? value : -kInfinity) + 0.0f);
  const int32_t ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF);
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<int64_t>(ordered)) << 32) | (n - 1 - index);
}

// Keys are padded to a multiple of this number by kExcluded.
constexpr int64_t kKeyPadding = 32;

FM_INLINE int64_t padded_keys(int64_t n) { return (n + kKeyPadding - 1) / kKeyPadding * kKeyPadding; }

FM_MULTIVERSION void keys_of_row(const float* values, int64_t n, int64_t* keys) {
#pragma omp simd
  for (int64_t e = 0; e < n; ++e) keys[e] = selection_key(values[e], e, n);
  std::fill(keys + n, keys + padded_keys(n), kExcluded);
}

// The largest key below `limit` of kBlock keys.
template <int kBlock>
FM_INLINE int64_t largest_below(const int64_t* keys, int64_t limit) {
  int64_t best = kExcluded;
#pragma omp simd reduction(max : best)
  for (int i = 0; i < kBlock; ++i) {
    const int64_t key = keys[i] < limit ? keys[i] : kExcluded;
    best = key > best ? key : best;
  }
  return best;
}

// A round takes the largest key of all blocks, and searches only its block for the next one.
template <int kBlock>
FM_INLINE void largest_keys_of_blocks(const int64_t* keys, int64_t n, int64_t count, int64_t* maxima,
                                      int64_t* indices) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  for (int64_t b = 0; b < blocks; ++b) {
    maxima[b] = largest_below<kBlock>(keys + b * kBlock, std::numeric_limits<int64_t>::max());
  }
  for (int64_t k = 0; k < count; ++k) {
    int64_t best = kExcluded;
    for (int64_t b = 0; b < blocks; ++b) best = maxima[b] > best ? maxima[b] : best;
    indices[k] = n - 1 - (best & 0xFFFFFFFF);
    const int64_t block = indices[k] / kBlock;
    maxima[block] = largest_below<kBlock>(keys + block * kBlock, best);
  }
}

// The indices of the largest keys, the largest first. `maxima` is memory for n numbers. Blocks are about as long as
// their number.
FM_MULTIVERSION void largest_keys(const int64_t* keys, int64_t n, int64_t count, int64_t* maxima, int64_t* indices) {
  if (n <= 64) return largest_keys_of_blocks<8>(keys, n, count, maxima, indices);
  if (n <= 256) return largest_keys_of_blocks<16>(keys, n, count, maxima, indices);
  largest_keys_of_blocks<32>(keys, n, count, maxima, indices);
}

// Memory for the numbers of one token.
struct RowScratch {
  float *scores, *softmax, *biased;
  int64_t *keys, *maxima;
  int64_t *group_keys, *groups, *chosen_groups;
};

// Excludes the experts outside the best groups: those with the largest sum of their two best values.
inline void exclude_groups(const float* values, const RoutingRule& rule, const RowScratch& scratch) {
  const int64_t size = rule.num_experts / rule.num_groups;
  for (int64_t group = 0; group < rule.num_groups; ++group) {
    float best = -kInfinity, second = -kInfinity;
    for (int64_t e = group * size; e < (group + 1) * size; ++e) {
      const float lower = values[e] > best ? best : values[e];
      if (values[e] > best) best = values[e];
      if (lower > second) second = lower;
    }
    scratch.group_keys[group] = selection_key(size > 1 ? best + second : best, group, rule.num_groups);
    scratch.groups[group] = 0;
  }
  std::fill(scratch.group_keys + rule.num_groups, scratch.group_keys + padded_keys(rule.num_groups), kExcluded);
  largest_keys(scratch.group_keys, rule.num_groups, rule.groups_per_token, scratch.maxima, scratch.chosen_groups);
  for (int64_t k = 0; k < rule.groups_per_token; ++k) scratch.groups[scratch.chosen_groups[k]] = 1;
  for (int64_t group = 0; group < rule.num_groups; ++group) {
    if (!scratch.groups[group]) std::fill_n(scratch.keys + group * size, size, kExcluded);
  }
}

inline void select_experts(const float* logits, const float* bias, const RoutingRule& rule, const RowScratch& scratch,
                           int64_t* experts) {
  const int64_t n = rule.num_experts;
  const float* biased = scratch.scores;
  if (bias != nullptr) {
    for (int64_t e = 0; e < n; ++e) scratch.biased[e] = scratch.scores[e] + bias[e];
    biased = scratch.biased;
  }
  keys_of_row(bias == nullptr ? logits : biased, n, scratch.keys);
  if (rule.groups_per_token < rule.num_groups) exclude_groups(biased, rule, scratch);
  largest_keys(scratch.keys, n, rule.num_selected, scratch.maxima, experts);
}

// ---- Gradient ------------------------------------------------------------------------------------------------------

// The gradients of the selected scores, from the gradients of their probabilities.
inline void gradients_of_chosen(const float* grad_probabilities, const float* scores, const int64_t* experts,
                                const RoutingRule& rule, float* grad) {
  float sum = 0.0f, dot = 0.0f;
  for (int64_t k = 0; k < rule.num_selected; ++k) {
    grad[k] = rule.scale * grad_probabilities[k];
    sum += scores[experts[k]];
    dot += grad[k] * scores[experts[k]];
  }
  if (!rule.normalize) return;
  const float divisor = sum + kTiny, mean = dot / divisor;
  for (int64_t k = 0; k < rule.num_selected; ++k) grad[k] = (grad[k] - mean) / divisor;
}

FM_MULTIVERSION float dot_of_rows(const float* a, const float* b, int64_t n) {
  float sum[1];
  lane_sums<1>(n, sum, [&](int64_t e, float* lane) __attribute__((always_inline)) { lane[0] += a[e] * b[e]; });
  return sum[0];
}

// (values - mean) / divisor
FM_MULTIVERSION void shifted_row(const float* values, float mean, float divisor, int64_t n, float* out) {
#pragma omp simd
  for (int64_t e = 0; e < n; ++e) out[e] = (values[e] - mean) / divisor;
}

// grad: of the scores. of_z: factor of the softmax in the gradient of z.
FM_MULTIVERSION void softmax_gradient(const float* grad, const float* softmax, float dot, float of_z, int64_t n,
                                      float* out) {
#pragma omp simd
  for (int64_t e = 0; e < n; ++e) out[e] = softmax[e] * (grad[e] - dot + of_z);
}

FM_MULTIVERSION void sigmoid_gradient(const float* grad, const float* scores, const float* softmax, float of_z,
                                      int64_t n, float* out) {
#pragma omp simd
  for (int64_t e = 0; e < n; ++e) out[e] = grad[e] * scores[e] * (1.0f - scores[e]) + of_z * softmax[e];
}

}  // namespace
}  // namespace fm

// Routing of tokens to experts on the CPU. The math is in fused_megatron/reference/expert_routing.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/column_sums.h"
#include "cpu/parameter.h"
#include "expert_routing/expert_routing_rows_cpu.h"

namespace fm {
namespace {

constexpr int64_t kGrainLogits = 8192;  // least number of logits for a thread

// The rows are cut into parts, which depend only on the shape; sums over rows are made part by part.
struct Parts {
  int64_t rows, count;
  Parts(int64_t rows, int64_t num_sequences)
      : rows(rows), count(std::clamp<int64_t>(rows / std::max<int64_t>(32, 4 * num_sequences), 1, 256)) {}
  int64_t begin(int64_t part) const { return part_begin(part, count, rows); }
  int64_t grain(int64_t num_experts) const {
    return std::max<int64_t>(1, kGrainLogits * count / std::max<int64_t>(1, rows * num_experts));
  }
};

// The memory of a thread for the numbers of one token.
class ThreadScratch {
 public:
  explicit ThreadScratch(const RoutingRule& rule)
      : floats_(static_cast<size_t>(3 * rule.num_experts)),
        integers_(static_cast<size_t>(2 * padded_keys(rule.num_experts) + 3 * padded_keys(rule.num_groups))) {
    row.softmax = floats_.data();
    row.scores = rule.sigmoid ? row.softmax + rule.num_experts : row.softmax;
    row.biased = row.softmax + 2 * rule.num_experts;
    row.keys = integers_.data();
    row.maxima = row.keys + padded_keys(rule.num_experts);
    row.group_keys = row.maxima + padded_keys(rule.num_experts);
    row.groups = row.group_keys + padded_keys(rule.num_groups);
    row.chosen_groups = row.groups + padded_keys(rule.num_groups);
  }

  RowScratch row;

 private:
  std::vector<float> floats_;
  std::vector<int64_t> integers_;
};

RowStatistics scores_of_row(const float* logits, const RoutingRule& rule, const RowScratch& scratch) {
  RowStatistics statistics;
  softmax_of_row(logits, rule.num_experts, scratch.softmax, &statistics);
  if (rule.sigmoid) statistics.total = sigmoid_of_row(logits, rule.num_experts, scratch.scores);
  return statistics;
}

void check_rule(const Tensor& logits, const RoutingRule& rule) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.scalar_type() == ScalarType::Float, "logits must be float32 [T, E]");
  STD_TORCH_CHECK(rule.num_groups > 0 && rule.groups_per_token > 0 && rule.groups_per_token <= rule.num_groups &&
                      rule.num_experts % rule.num_groups == 0,
                  "num_groups must divide the experts, and groups_per_token be at most num_groups");
  STD_TORCH_CHECK(rule.num_selected > 0 &&
                      rule.num_selected <= rule.num_experts / rule.num_groups * rule.groups_per_token,
                  "num_selected must be at most the experts of the groups of a token");
}

// Routes the rows [begin, end); adds to the sums [B, E] of their sequences, and returns their sum of lse^2.
double route_rows(const float* logits, const float* bias, const RoutingRule& rule, int64_t num_sequences, int64_t begin,
                  int64_t end, const RowScratch& scratch, int64_t* all_experts, float* all_probabilities, int64_t* counts,
                  float* score_sums) {
  const int64_t n = rule.num_experts, num_selected = rule.num_selected;
  double z = 0.0;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = logits + row * n;
    const RowStatistics statistics = scores_of_row(x, rule, scratch);
    int64_t* experts = all_experts + row * num_selected;
    float* probabilities = all_probabilities + row * num_selected;
    select_experts(x, bias, rule, scratch, experts);
    float divisor = 1.0f;
    if (rule.normalize) {
      divisor = 0.0f;
      for (int64_t k = 0; k < num_selected; ++k) divisor += scratch.scores[experts[k]];
      divisor += kTiny;
    }
    const int64_t sequence = row % num_sequences;
    for (int64_t k = 0; k < num_selected; ++k) {
      probabilities[k] = rule.scale * (scratch.scores[experts[k]] / divisor);
      ++counts[sequence * n + experts[k]];
    }
    add_row(scratch.scores, rule.sigmoid ? 1.0f / (statistics.total + kTiny) : 1.0f, n, score_sums + sequence * n);
    const double lse = static_cast<double>(statistics.maximum) + std::log(static_cast<double>(statistics.exp_sum));
    z += lse * lse;
  }
  return z;
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Routed expert_routing_forward(const Tensor& logits_any, const OptionalTensor& bias_any, int64_t num_selected,
                              bool sigmoid, bool normalize, double scale, int64_t num_groups, int64_t groups_per_token,
                              int64_t num_sequences) {
  const Tensor logits = made_contiguous(logits_any);
  const int64_t num_rows = logits.size(0), num_experts = logits.size(1);
  const RoutingRule rule{num_experts, num_selected,     sigmoid, normalize, static_cast<float>(scale),
                         num_groups,  groups_per_token};
  check_rule(logits, rule);
  STD_TORCH_CHECK(num_sequences > 0 && num_rows % num_sequences == 0, "num_sequences must divide the tokens");
  const OptionalTensor bias = checked_parameter(bias_any, logits, "bias");
  const FloatParameter bias_values(bias, bias ? num_experts : 0, 0.0f);
  const float* bias_data = bias ? bias_values.data() : nullptr;
  const int64_t selected_sizes[] = {num_rows, num_selected}, sums_sizes[] = {num_sequences, num_experts};
  const Tensor experts = empty(selected_sizes, ScalarType::Long, logits);
  const Tensor probabilities = empty(selected_sizes, ScalarType::Float, logits);
  const Tensor counts = empty(sums_sizes, ScalarType::Long, logits);
  const Tensor score_sums = empty(sums_sizes, ScalarType::Float, logits);
  const Tensor z = empty(std::span<const int64_t>(), ScalarType::Float, logits);
  auto* expert_data = static_cast<int64_t*>(experts.mutable_data_ptr());
  auto* probability_data = static_cast<float*>(probabilities.mutable_data_ptr());
  const float* x = static_cast<const float*>(logits.const_data_ptr());
  const Parts parts(num_rows, num_sequences);
  const int64_t num_sums = num_sequences * num_experts;
  std::vector<int64_t> part_counts(static_cast<size_t>(parts.count * num_sums));
  std::vector<float> part_sums(static_cast<size_t>(parts.count * num_sums));
  std::vector<double> part_z(static_cast<size_t>(parts.count));
  torch::stable::parallel_for(0, parts.count, parts.grain(num_experts), [&](int64_t first, int64_t last) {
    const ThreadScratch scratch(rule);
    for (int64_t part = first; part < last; ++part) {
      part_z[part] = route_rows(x, bias_data, rule, num_sequences, parts.begin(part), parts.begin(part + 1),
                                scratch.row, expert_data, probability_data, part_counts.data() + part * num_sums,
                                part_sums.data() + part * num_sums);
    }
  });
  auto* all_counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  auto* all_sums = static_cast<float*>(score_sums.mutable_data_ptr());
  finish_column_sums(part_sums.data(), parts.count, num_sums, num_sums,
                     [&](int64_t j, float sum) { all_sums[j] = sum; });
  double all_z = 0.0;
  std::fill_n(all_counts, num_sums, 0);
  for (int64_t part = 0; part < parts.count; ++part) {
    for (int64_t j = 0; j < num_sums; ++j) all_counts[j] += part_counts[part * num_sums + j];
    all_z += part_z[part];
  }
  *static_cast<float*>(z.mutable_data_ptr()) = static_cast<float>(all_z);
  return {experts, probabilities, counts, score_sums, z};
}

struct RouteGradients {
  const float *probabilities, *score_sums;
  float z;
};

void gradient_of_rows(const float* logits, const int64_t* experts, const RouteGradients& grads,
                      const RoutingRule& rule, int64_t num_sequences, int64_t begin, int64_t end, float* out) {
  const int64_t n = rule.num_experts, num_selected = rule.num_selected;
  const ThreadScratch scratch(rule);
  const float *scores = scratch.row.scores, *softmax = scratch.row.softmax;
  float* grad = scratch.row.biased;
  std::vector<float> grad_chosen(static_cast<size_t>(num_selected));
  for (int64_t row = begin; row < end; ++row) {
    const RowStatistics saved = scores_of_row(logits + row * n, rule, scratch.row);
    const int64_t* chosen = experts + row * num_selected;
    gradients_of_chosen(grads.probabilities + row * num_selected, scores, chosen, rule, grad_chosen.data());
    const float* grad_sums = grads.score_sums + row % num_sequences * n;
    if (rule.sigmoid) {
      const float divisor = saved.total + kTiny;
      shifted_row(grad_sums, dot_of_rows(grad_sums, scores, n) / divisor, divisor, n, grad);
    } else {
      std::copy_n(grad_sums, n, grad);
    }
    for (int64_t k = 0; k < num_selected; ++k) grad[chosen[k]] += grad_chosen[k];
    const float of_z = 2.0f * grads.z * (saved.maximum + std::log(saved.exp_sum));
    if (rule.sigmoid) {
      sigmoid_gradient(grad, scores, softmax, of_z, n, out + row * n);
    } else {
      softmax_gradient(grad, softmax, dot_of_rows(grad, softmax, n), of_z, n, out + row * n);
    }
  }
}

Tensor expert_routing_backward(const Tensor& grad_probabilities_any, const Tensor& grad_score_sums_any,
                               const Tensor& grad_z, const Tensor& logits_any, const Tensor& experts, bool sigmoid,
                               bool normalize, double scale) {
  const Tensor logits = made_contiguous(logits_any), grad_probabilities = made_contiguous(grad_probabilities_any);
  const Tensor grad_score_sums = made_contiguous(grad_score_sums_any);
  STD_TORCH_CHECK(experts.dim() == 2 && grad_score_sums.dim() == 2, "experts and grad_score_sums must be matrices");
  const int64_t num_rows = logits.size(0), num_experts = logits.size(1), num_sequences = grad_score_sums.size(0);
  const RoutingRule rule{num_experts, experts.size(1), sigmoid, normalize, static_cast<float>(scale), 1, 1};
  check_rule(logits, rule);
  STD_TORCH_CHECK(experts.scalar_type() == ScalarType::Long && experts.is_contiguous() && experts.size(0) == num_rows,
                  "experts must be contiguous int64 [T, K]");
  STD_TORCH_CHECK(grad_probabilities.scalar_type() == ScalarType::Float &&
                      grad_probabilities.numel() == experts.numel(),
                  "grad_probabilities must be float32 [T, K]");
  STD_TORCH_CHECK(grad_score_sums.scalar_type() == ScalarType::Float && grad_score_sums.size(1) == num_experts &&
                      num_sequences > 0 && num_rows % num_sequences == 0,
                  "grad_score_sums must be float32 [B, E], and B divide the tokens");
  STD_TORCH_CHECK(grad_z.scalar_type() == ScalarType::Float && grad_z.numel() == 1, "grad_z must be one float32");
  const auto* chosen = static_cast<const int64_t*>(experts.const_data_ptr());
  STD_TORCH_CHECK(std::all_of(chosen, chosen + experts.numel(), [&](int64_t e) { return e >= 0 && e < num_experts; }),
                  "experts must be ids in [0, E)");
  const Tensor grad = empty(Sizes(logits), ScalarType::Float, logits);
  const RouteGradients grads{static_cast<const float*>(grad_probabilities.const_data_ptr()),
                             static_cast<const float*>(grad_score_sums.const_data_ptr()),
                             *static_cast<const float*>(grad_z.const_data_ptr())};
  const auto* x = static_cast<const float*>(logits.const_data_ptr());
  auto* out = static_cast<float*>(grad.mutable_data_ptr());
  const Parts parts(num_rows, num_sequences);
  torch::stable::parallel_for(0, parts.count, parts.grain(num_experts), [&](int64_t first, int64_t last) {
    gradient_of_rows(x, chosen, grads, rule, num_sequences, parts.begin(first), parts.begin(last), out);
  });
  return grad;
}

}  // namespace
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) {
  m.impl("expert_routing_forward", TORCH_BOX(&fm::expert_routing_forward));
  m.impl("expert_routing_backward", TORCH_BOX(&fm::expert_routing_backward));
}

// Cross-entropy of a vocabulary shard on the CPU. The math is in fused_megatron/reference/cross_entropy.py.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cross_entropy/cross_entropy_rows_cpu.h"

namespace fm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Gradients that no cache will hold are written past the caches, which saves reading the lines before writing them.
constexpr int64_t kStreamFromBytes = int64_t{32} << 20;

struct Vocabulary {
  int64_t start, size, num_real;  // num_real: columns of this shard that are no padding
  int64_t ignore_index;
  double label_smoothing;

  Vocabulary(int64_t start, int64_t size, int64_t num_columns, int64_t ignore_index, double label_smoothing)
      : start(start), size(size), num_real(std::clamp<int64_t>(size - start, 0, num_columns)),
        ignore_index(ignore_index), label_smoothing(label_smoothing) {}

  bool invalid(int64_t target) const { return target < 0 || target >= size; }
  bool owns(int64_t target) const { return target >= start && target < start + num_real; }
};

template <class T>
void statistics_of_rows(
    const T* logits, int64_t stride, const int64_t* target, const Vocabulary& vocabulary, int64_t begin, int64_t end,
    float* stats) {
  const auto smoothing = static_cast<float>(vocabulary.label_smoothing);
  const auto per_word = static_cast<float>(vocabulary.label_smoothing / vocabulary.size);
  for (int64_t row = begin; row < end; ++row) {
    float lse = 0.0f, linear = 0.0f;
    const int64_t t = target[row];
    if (t != vocabulary.ignore_index) {
      const T* x = logits + row * stride;
      const Statistics found = smoothing == 0.0f ? statistics_of_row(x, vocabulary.num_real)
                                                 : statistics_with_sum_of_row(x, vocabulary.num_real);
      lse = vocabulary.num_real == 0 ? -kInfinity : found.lse;
      if (vocabulary.owns(t)) linear = -(1.0f - smoothing) * to_float(x[t - vocabulary.start]);
      if (smoothing != 0.0f) linear -= per_word * found.sum;
      if (vocabulary.invalid(t)) linear = kNaN;
    }
    stats[2 * row] = lse;
    stats[2 * row + 1] = linear;
  }
}

template <class T>
void gradient_of_rows(
    const float* grad_loss, const T* logits, int64_t stride, const int64_t* target, const float* lse,
    const Vocabulary& vocabulary, double z_loss, int64_t num_columns, bool stream, int64_t begin, int64_t end,
    T* dlogits) {
  const auto per_word = static_cast<float>(vocabulary.label_smoothing / vocabulary.size);
  const auto hard = static_cast<float>(1.0 - vocabulary.label_smoothing);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t t = target[row];
    T* dx = dlogits + row * num_columns;
    const int64_t num_written = t == vocabulary.ignore_index ? 0 : vocabulary.num_real;
    if (num_written > 0) {
      const float g = vocabulary.invalid(t) ? kNaN : grad_loss[row];
      const double scale = 1.0 + 2.0 * z_loss * lse[row];
      const GradientRow work{
          g * static_cast<float>(scale), -g * per_word, -g * hard, lse[row],
          vocabulary.owns(t) ? t - vocabulary.start : -1, stream};
      gradient_of_row(logits + row * stride, num_written, &work, dx);
    }
    std::memset(static_cast<void*>(dx + num_written), 0, (num_columns - num_written) * sizeof(T));
  }
#if defined(__SSE2__)
  _mm_sfence();  // streamed stores are not ordered with what tells the other threads that this one is done
#endif
}

// Rows for a thread, so that each has at least some 32 Ki logits: less does not pay for waking it.
int64_t rows_per_thread(int64_t num_columns) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, num_columns)); }

// ---- The ops -------------------------------------------------------------------------------------------------------

Tensor cross_entropy_statistics(
    const Tensor& logits, const Tensor& target, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
    double label_smoothing) {
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1), stride = logits.stride(0);
  STD_TORCH_CHECK(num_columns <= 1 || logits.stride(1) == 1, "logits: the columns must lie side by side");
  const Vocabulary vocabulary(vocab_start, vocab_size, num_columns, ignore_index, label_smoothing);
  const Tensor stats = torch::stable::new_empty(logits, {num_rows, 2}, ScalarType::Float);
  const auto* t = static_cast<const int64_t*>(target.const_data_ptr());
  auto* out = static_cast<float*>(stats.mutable_data_ptr());
  const void* x = logits.const_data_ptr();
  const ScalarType dtype = logits.scalar_type();
  torch::stable::parallel_for(0, num_rows, rows_per_thread(num_columns), [&](int64_t begin, int64_t end) {
    if (dtype == ScalarType::Float) {
      statistics_of_rows(static_cast<const float*>(x), stride, t, vocabulary, begin, end, out);
    } else if (dtype == ScalarType::BFloat16) {
      statistics_of_rows(static_cast<const BFloat16*>(x), stride, t, vocabulary, begin, end, out);
    } else {
      statistics_of_rows(static_cast<const Float16*>(x), stride, t, vocabulary, begin, end, out);
    }
  });
  return stats;
}

std::tuple<Tensor, Tensor> cross_entropy_merge(
    const Tensor& stats, const Tensor& target, int64_t ignore_index, double z_loss) {
  const int64_t num_shards = stats.size(0), num_rows = stats.size(1);
  const Tensor loss = torch::stable::new_empty(stats, {num_rows}, ScalarType::Float);
  const Tensor lse = torch::stable::new_empty(stats, {num_rows}, ScalarType::Float);
  const auto* in = static_cast<const float*>(stats.const_data_ptr());
  const auto* t = static_cast<const int64_t*>(target.const_data_ptr());
  auto* loss_out = static_cast<float*>(loss.mutable_data_ptr());
  auto* lse_out = static_cast<float*>(lse.mutable_data_ptr());
  for (int64_t row = 0; row < num_rows; ++row) {
    float maximum = -kInfinity;
    for (int64_t shard = 0; shard < num_shards; ++shard) maximum = std::max(maximum, in[2 * (shard * num_rows + row)]);
    const float shift = maximum == -kInfinity ? 0.0f : maximum;
    float exp_sum = 0.0f, linear = 0.0f;
    for (int64_t shard = 0; shard < num_shards; ++shard) {
      exp_sum += std::exp(in[2 * (shard * num_rows + row)] - shift);
      linear += in[2 * (shard * num_rows + row) + 1];
    }
    lse_out[row] = shift + std::log(exp_sum);
    const float z_term = z_loss == 0.0 ? 0.0f : static_cast<float>(z_loss) * lse_out[row] * lse_out[row];
    loss_out[row] = t[row] == ignore_index ? 0.0f : lse_out[row] + linear + z_term;
  }
  return {loss, lse};
}

Tensor cross_entropy_gradient(
    const Tensor& grad_loss, const Tensor& logits, const Tensor& target, const Tensor& lse, int64_t vocab_start,
    int64_t vocab_size, int64_t ignore_index, double label_smoothing, double z_loss) {
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1), stride = logits.stride(0);
  STD_TORCH_CHECK(num_columns <= 1 || logits.stride(1) == 1, "logits: the columns must lie side by side");
  const Vocabulary vocabulary(vocab_start, vocab_size, num_columns, ignore_index, label_smoothing);
  const Tensor dlogits = torch::stable::new_empty(logits, {num_rows, num_columns});
  const bool stream = num_rows * num_columns * static_cast<int64_t>(logits.element_size()) >= kStreamFromBytes;
  const auto* g = static_cast<const float*>(grad_loss.const_data_ptr());
  const auto* t = static_cast<const int64_t*>(target.const_data_ptr());
  const auto* z = static_cast<const float*>(lse.const_data_ptr());
  const void* x = logits.const_data_ptr();
  void* out = dlogits.mutable_data_ptr();
  const ScalarType dtype = logits.scalar_type();
  torch::stable::parallel_for(0, num_rows, rows_per_thread(num_columns), [&](int64_t begin, int64_t end) {
    const auto rows = [&]<class T>(const T* typed, T* typed_out) {
      gradient_of_rows(g, typed, stride, t, z, vocabulary, z_loss, num_columns, stream, begin, end, typed_out);
    };
    if (dtype == ScalarType::Float) {
      rows(static_cast<const float*>(x), static_cast<float*>(out));
    } else if (dtype == ScalarType::BFloat16) {
      rows(static_cast<const BFloat16*>(x), static_cast<BFloat16*>(out));
    } else {
      rows(static_cast<const Float16*>(x), static_cast<Float16*>(out));
    }
  });
  return dlogits;
}

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) {
  m.impl("cross_entropy_statistics", TORCH_BOX(&cross_entropy_statistics));
  m.impl("cross_entropy_merge", TORCH_BOX(&cross_entropy_merge));
  m.impl("cross_entropy_gradient", TORCH_BOX(&cross_entropy_gradient));
}

}  // namespace
}  // namespace fm

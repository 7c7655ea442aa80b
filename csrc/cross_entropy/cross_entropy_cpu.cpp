// Cross-entropy of a vocabulary shard on the CPU. The math is in fused_megatron/reference/cross_entropy.py.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cpu/parameter.h"
#include "cross_entropy/cross_entropy_rows_cpu.h"

namespace fm {
namespace {

// Gradients too large for a cache bypass the caches, which saves reading the lines before writing them.
constexpr int64_t kStreamFromBytes = int64_t{32} << 20;

struct Vocabulary {
  int64_t start, size, num_real;  // num_real: columns of this shard that are not padding
  int64_t ignore_index;
  double label_smoothing;
  Softcap softcap;  // cap 0: no softcap

  Vocabulary(int64_t start, int64_t size, int64_t num_columns, int64_t ignore_index, double label_smoothing,
             double softcap)
      : start(start), size(size), num_real(std::clamp<int64_t>(size - start, 0, num_columns)),
        ignore_index(ignore_index), label_smoothing(label_smoothing),
        softcap{static_cast<float>(softcap), softcap == 0.0 ? 0.0f : static_cast<float>(-2.0 / softcap)} {}

  bool has_softcap() const { return softcap.cap != 0.0f; }
  bool invalid(int64_t target) const { return target < 0 || target >= size; }
  bool owns(int64_t target) const { return target >= start && target < start + num_real; }
  // The factor in the linear term of this shard of a number that all logits have in common; the sum over shards is 1.
  double share(int64_t target) const {
    return (owns(target) ? 1.0 - label_smoothing : 0.0) + label_smoothing * num_real / size;
  }
};

// lse as (shift, log_sum): log_sum has what the float32 nearest to a large lse rounds off.
void write_lse(double lse, float* out) {
  const float shift = lse == -kInfinity ? 0.0f : static_cast<float>(lse);
  out[0] = shift;
  out[1] = static_cast<float>(lse - shift);
}

void check_logits(const Tensor& logits) {
  check_kernel_dtype(logits, "logits");
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                  "logits must be [tokens, columns], the columns side by side");
}

template <class T>
const T* one_per_token(const Tensor& tensor, int64_t num_rows, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.numel() == num_rows && tensor.is_contiguous(), name,
                  " must be contiguous, one for every token");
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Calls f with the logits as their C++ type.
template <class F>
void for_logits(const Tensor& logits, const F& f) {
  for_cpu_dtype(logits.scalar_type(), [&]<class T>(T) { f(static_cast<const T*>(logits.const_data_ptr())); });
}

float target_logit(float x, const Vocabulary& vocabulary) {
  return vocabulary.has_softcap() ? logit<true>(x, vocabulary.softcap) : x;
}

template <class T>
void statistics_of_rows(
    const T* logits, int64_t stride, const int64_t* target, const Vocabulary& vocabulary, int64_t begin, int64_t end,
    float* stats) {
  const double smoothing = vocabulary.label_smoothing;
  for (int64_t row = begin; row < end; ++row) {
    float* out = stats + 3 * row;
    out[0] = out[1] = out[2] = 0.0f;
    const int64_t t = target[row];
    if (t != vocabulary.ignore_index) {
      const T* x = logits + row * stride;
      const Statistics found = vocabulary.has_softcap()
                                   ? capped_statistics_of_row(x, vocabulary.num_real, &vocabulary.softcap)
                               : smoothing == 0.0 ? statistics_of_row(x, vocabulary.num_real)
                                                  : statistics_with_sum_of_row(x, vocabulary.num_real);
      write_lse(found.lse, out);
      const double shift = out[0];
      double linear = 0.0;
      if (vocabulary.owns(t)) {
        linear = -(1.0 - smoothing) * (target_logit(to_float(x[t - vocabulary.start]), vocabulary) - shift);
      }
      if (smoothing != 0.0) linear -= smoothing / vocabulary.size * (found.sum - vocabulary.num_real * shift);
      out[2] = vocabulary.invalid(t) ? kNaN : static_cast<float>(linear);
    }
  }
}

// If dlogits is logits, the gradient overwrites the logits.
template <class T>
void gradient_of_rows(
    const float* grad_loss, const T* logits, int64_t stride, const int64_t* target, const float* lse,
    const Vocabulary& vocabulary, double z_loss, int64_t num_columns, bool stream, int64_t begin, int64_t end,
    T* dlogits, int64_t dlogits_stride) {
  const auto per_word = static_cast<float>(vocabulary.label_smoothing / vocabulary.size);
  const auto hard = static_cast<float>(1.0 - vocabulary.label_smoothing);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t t = target[row];
    const T* x = logits + row * stride;
    T* dx = dlogits + row * dlogits_stride;
    const int64_t num_written = t == vocabulary.ignore_index ? 0 : vocabulary.num_real;
    if (num_written > 0) {
      const float g = vocabulary.invalid(t) ? kNaN : grad_loss[row];
      const float shift = lse[2 * row];
      const double log_sum = lse[2 * row + 1];
      // exp(x - shift - log_sum) as a product: log_sum is at most the log of the vocabulary size.
      const double scale = (1.0 + 2.0 * z_loss * (shift + log_sum)) * std::exp(-log_sum);
      const GradientRow work{
          g * static_cast<float>(scale), -g * per_word, -g * hard, shift,
          vocabulary.owns(t) ? t - vocabulary.start : -1, stream};
      if (vocabulary.has_softcap()) {
        capped_gradient_of_row(x, num_written, &vocabulary.softcap, &work, dx);
      } else {
        gradient_of_row(x, num_written, &work, dx);
      }
    }
    std::memset(static_cast<void*>(dx + num_written), 0, (num_columns - num_written) * sizeof(T));
  }
#if defined(__SSE2__)
  _mm_sfence();  // orders streamed stores before the signal that this thread is done
#endif
}

// Rows for a thread, such that each has at least about 32 Ki logits: fewer are not worth waking it.
int64_t rows_per_thread(int64_t num_columns) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, num_columns)); }

// ---- The ops -------------------------------------------------------------------------------------------------------

// Every op takes all terms of the loss (LossTerms.scalars()), even those that it does not need.
Tensor cross_entropy_statistics(
    const Tensor& logits, const Tensor& target, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
    double label_smoothing, double /*z_loss*/, double softcap) {
  check_logits(logits);
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1), stride = logits.stride(0);
  const Vocabulary vocabulary(vocab_start, vocab_size, num_columns, ignore_index, label_smoothing, softcap);
  const Tensor stats = torch::stable::new_empty(logits, {num_rows, 3}, ScalarType::Float);
  const auto* t = one_per_token<int64_t>(target, num_rows, ScalarType::Long, "target");
  auto* out = static_cast<float*>(stats.mutable_data_ptr());
  for_logits(logits, [&](const auto* x) {
    torch::stable::parallel_for(0, num_rows, rows_per_thread(num_columns), [&](int64_t begin, int64_t end) {
      statistics_of_rows(x, stride, t, vocabulary, begin, end, out);
    });
  });
  return stats;
}

std::tuple<Tensor, Tensor> cross_entropy_merge(
    const Tensor& stats, const Tensor& target, int64_t num_columns, int64_t /*vocab_start*/, int64_t vocab_size,
    int64_t ignore_index, double label_smoothing, double z_loss, double /*softcap*/) {
  STD_TORCH_CHECK(stats.dim() == 3 && stats.size(2) == 3 && stats.scalar_type() == ScalarType::Float &&
                      stats.is_contiguous(), "stats must be float32 [shards, tokens, 3], contiguous");
  const int64_t num_shards = stats.size(0), num_rows = stats.size(1);
  const Tensor loss = torch::stable::new_empty(stats, {num_rows}, ScalarType::Float);
  const Tensor lse = torch::stable::new_empty(stats, {num_rows, 2}, ScalarType::Float);
  const auto* in = static_cast<const float*>(stats.const_data_ptr());
  const auto* t = one_per_token<int64_t>(target, num_rows, ScalarType::Long, "target");
  auto* loss_out = static_cast<float*>(loss.mutable_data_ptr());
  auto* lse_out = static_cast<float*>(lse.mutable_data_ptr());
  const auto lse_of = [](const float* stat) { return static_cast<double>(stat[0]) + stat[1]; };
  for (int64_t row = 0; row < num_rows; ++row) {
    const auto of_shard = [&](int64_t shard) { return in + 3 * (shard * num_rows + row); };
    double maximum = -kInfinity;
    for (int64_t shard = 0; shard < num_shards; ++shard) maximum = std::max(maximum, lse_of(of_shard(shard)));
    if (maximum == -kInfinity) maximum = 0.0;
    double exp_sum = 0.0;
    for (int64_t shard = 0; shard < num_shards; ++shard) exp_sum += std::exp(lse_of(of_shard(shard)) - maximum);
    const double whole = maximum + std::log(exp_sum);
    float* shift_and_log_sum = lse_out + 2 * row;
    write_lse(whole, shift_and_log_sum);
    const double shift = shift_and_log_sum[0];
    double linear = 0.0;
    for (int64_t shard = 0; shard < num_shards; ++shard) {
      const Vocabulary part(shard * num_columns, vocab_size, num_columns, ignore_index, label_smoothing, 0.0);
      linear += of_shard(shard)[2] + part.share(t[row]) * (shift - of_shard(shard)[0]);
    }
    const double z_term = z_loss == 0.0 ? 0.0 : z_loss * whole * whole;
    loss_out[row] = t[row] == ignore_index ? 0.0f : static_cast<float>(whole - shift + linear + z_term);
  }
  return {loss, lse};
}

void write_gradient(
    const Tensor& grad_loss, const Tensor& logits, const Tensor& target, const Tensor& lse,
    const Vocabulary& vocabulary, double z_loss, bool stream, void* dlogits, int64_t dlogits_stride) {
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1), stride = logits.stride(0);
  const auto* g = one_per_token<float>(grad_loss, num_rows, ScalarType::Float, "grad_loss");
  const auto* t = one_per_token<int64_t>(target, num_rows, ScalarType::Long, "target");
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.numel() == 2 * num_rows && lse.is_contiguous(),
                  "lse must be contiguous float32, two for every token");
  const auto* z = static_cast<const float*>(lse.const_data_ptr());
  for_logits(logits, [&]<class T>(const T* x) {
    torch::stable::parallel_for(0, num_rows, rows_per_thread(num_columns), [&](int64_t begin, int64_t end) {
      gradient_of_rows(g, x, stride, t, z, vocabulary, z_loss, num_columns, stream, begin, end,
                       static_cast<T*>(dlogits), dlogits_stride);
    });
  });
}

Tensor cross_entropy_gradient(
    const Tensor& grad_loss, const Tensor& logits, const Tensor& target, const Tensor& lse, int64_t vocab_start,
    int64_t vocab_size, int64_t ignore_index, double label_smoothing, double z_loss, double softcap) {
  check_logits(logits);
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1);
  const Vocabulary vocabulary(vocab_start, vocab_size, num_columns, ignore_index, label_smoothing, softcap);
  const Tensor dlogits = torch::stable::new_empty(logits, {num_rows, num_columns});
  const bool stream = num_rows * num_columns * static_cast<int64_t>(logits.element_size()) >= kStreamFromBytes;
  write_gradient(grad_loss, logits, target, lse, vocabulary, z_loss, stream, dlogits.mutable_data_ptr(), num_columns);
  return dlogits;
}

// Never streamed: the lines that are written have just been read.
void cross_entropy_gradient_(
    const Tensor& grad_loss, Tensor logits, const Tensor& target, const Tensor& lse, int64_t vocab_start,
    int64_t vocab_size, int64_t ignore_index, double label_smoothing, double z_loss, double softcap) {
  check_logits(logits);
  const Vocabulary vocabulary(vocab_start, vocab_size, logits.size(1), ignore_index, label_smoothing, softcap);
  write_gradient(grad_loss, logits, target, lse, vocabulary, z_loss, false, logits.mutable_data_ptr(),
                 logits.stride(0));
}

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) {
  m.impl("cross_entropy_statistics", TORCH_BOX(&cross_entropy_statistics));
  m.impl("cross_entropy_merge", TORCH_BOX(&cross_entropy_merge));
  m.impl("cross_entropy_gradient", TORCH_BOX(&cross_entropy_gradient));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_));
}

}  // namespace
}  // namespace fm

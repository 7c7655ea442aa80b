// Cross-entropy of a vocabulary shard on the CPU. The math is in fused_megatron/reference/cross_entropy.py.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "multiversion.h"
#include "vector_math_cpu.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fused_megatron {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Columns worked on at a time: a block that has to be read again is still in the first-level cache.
constexpr int64_t kBlock = 1024;
// A sum of exponentials beyond this is taken again with a larger shift, well before vector_exp leaves its range.
constexpr float kRescaleAbove = 1e30f;
// How far ahead rows are fetched: the long chains of exp keep the processor from running ahead by itself.
constexpr int64_t kPrefetchBytes = 8192;
// Gradients that no cache will hold are written past the caches, which saves reading the lines before writing them.
constexpr int64_t kStreamFromBytes = int64_t{32} << 20;

struct Statistics {
  float lse;
  float sum;
};

struct GradientRow {
  float scale_p;     // the gradient is scale_p * exp(x - lse) + offset, and at the target + target_term
  float offset;
  float target_term;
  float lse;
  int64_t target;    // column in this shard, or -1
  bool stream;
};

template <class T>
FM_INLINE float block_maximum(const T* x, int64_t n) {
  float maximum = -kInfinity;
  for (int64_t j = 0; j < n; ++j) maximum = std::max(maximum, to_float(x[j]));
  return maximum;
}

FM_INLINE void prefetch(const void* from, int64_t num_bytes) {
#if defined(__GNUC__)
  const char* lines = static_cast<const char*>(from) + kPrefetchBytes;
  for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(lines + i, 0, 2);
#endif
}

// sum_j exp(x_j - shift); adds sum_j x_j to `sum` if asked for.
template <bool kWithSum, class T>
FM_INLINE float block_exp_sum(const T* x, int64_t n, float shift, double& sum) {
  float exp_sum = 0.0f, plain_sum = 0.0f;
#pragma omp simd reduction(+ : exp_sum, plain_sum)
  for (int64_t j = 0; j < n; ++j) {
    const float value = to_float(x[j]);
    exp_sum += vector_exp(value - shift);
    if (kWithSum) plain_sum += value;
  }
  sum += plain_sum;
  return exp_sum;
}

// One pass: a block is summed with the shift found so far. Only the first block, and one whose values lie so far above
// the shift that the sum might overflow, is read again for its maximum.
template <bool kWithSum, class T>
FM_INLINE Statistics row_statistics(const T* x, int64_t n) {
  float shift = -kInfinity;
  double exp_sum = 0.0, sum = 0.0, unused = 0.0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t length = std::min(kBlock, n - start);
    prefetch(x + start, length * sizeof(T));
    // -inf minus -inf would be NaN; shifted by 0, -inf gives 0, and NaN, which is no maximum, still gives NaN.
    float block = block_exp_sum<kWithSum>(x + start, length, shift == -kInfinity ? 0.0f : shift, sum);
    if (shift == -kInfinity || !(std::abs(block) < kRescaleAbove)) {
      const float wanted = block_maximum(x + start, length);
      if (wanted > shift) {
        exp_sum *= std::exp(static_cast<double>(shift) - wanted);
        shift = wanted;
        block = block_exp_sum<false>(x + start, length, shift, unused);
      }
    }
    exp_sum += block;
  }
  const double lse = (shift == -kInfinity ? 0.0 : shift) + std::log(exp_sum);
  return {static_cast<float>(lse), static_cast<float>(sum)};
}

// Copy whole 16-byte pieces past the caches; both ends aligned to 16 bytes.
FM_INLINE void stream_copy(void* destination, const void* source, int64_t num_bytes) {
#if defined(__SSE2__)
  auto* to = static_cast<__m128i*>(destination);
  const auto* from = static_cast<const __m128i*>(source);
  for (int64_t i = 0; i < num_bytes / 16; ++i) _mm_stream_si128(to + i, _mm_load_si128(from + i));
#else
  std::memcpy(destination, source, num_bytes);
#endif
}

template <class T>
FM_INLINE void gradient_block(const T* x, int64_t n, const GradientRow& row, int64_t target, T* result) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    round_to(row.scale_p * vector_exp(to_float(x[j]) - row.lse) + row.offset, result[j]);
  }
  if (target >= 0 && target < n) {
    const float p = vector_exp(to_float(x[target]) - row.lse);
    round_to(row.scale_p * p + (row.offset + row.target_term), result[target]);
  }
}

template <class T>
FM_INLINE void row_gradient(const T* x, int64_t n, const GradientRow& row, T* dx) {
  if (!row.stream) return gradient_block(x, n, row, row.target, dx);
  alignas(64) T buffer[kBlock];
  constexpr int64_t kPerLine = 64 / sizeof(T);
  const int64_t misaligned = (reinterpret_cast<uintptr_t>(dx) % 64) / sizeof(T);
  const int64_t head = std::min(n, (kPerLine - misaligned) % kPerLine);
  gradient_block(x, head, row, row.target, dx);
  int64_t start = head;
  for (; start + kPerLine <= n; ) {
    const int64_t length = std::min(kBlock, (n - start) / kPerLine * kPerLine);
    prefetch(x + start, length * sizeof(T));
    gradient_block(x + start, length, row, row.target - start, buffer);
    stream_copy(dx + start, buffer, length * sizeof(T));
    start += length;
  }
  gradient_block(x + start, n - start, row, row.target - start, dx + start);
}

#define FM_ROWS(T)                                                                              \
  FM_MULTIVERSION Statistics statistics_of_row(const T* x, int64_t n) {                         \
    return row_statistics<false>(x, n);                                                         \
  }                                                                                             \
  FM_MULTIVERSION Statistics statistics_with_sum_of_row(const T* x, int64_t n) {                \
    return row_statistics<true>(x, n);                                                          \
  }                                                                                             \
  FM_MULTIVERSION void gradient_of_row(const T* x, int64_t n, const GradientRow* row, T* dx) {  \
    row_gradient(x, n, *row, dx);                                                               \
  }
FM_ROWS(float)
FM_ROWS(BFloat16Bits)
FM_ROWS(Float16Bits)
#undef FM_ROWS

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
    const Vocabulary& vocabulary, double z_loss, int64_t num_columns, bool stream, int64_t begin, int64_t end, T* dlogits) {
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
      statistics_of_rows(static_cast<const BFloat16Bits*>(x), stride, t, vocabulary, begin, end, out);
    } else {
      statistics_of_rows(static_cast<const Float16Bits*>(x), stride, t, vocabulary, begin, end, out);
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
      rows(static_cast<const BFloat16Bits*>(x), static_cast<BFloat16Bits*>(out));
    } else {
      rows(static_cast<const Float16Bits*>(x), static_cast<Float16Bits*>(out));
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
}  // namespace fused_megatron

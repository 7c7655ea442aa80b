// Order of tokens by expert on the CPU: a counting sort, the gather of rows, and the weighted sum back to tokens.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/column_sums.h"
#include "cpu/parameter.h"
#include "expert_permutation/expert_rows_cpu.h"

namespace fm {
namespace {

constexpr int64_t kGrainBytes = 65536;  // least number of bytes for a thread

int64_t rows_per_thread(int64_t row_bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes)); }

const int64_t* indices(const Tensor& tensor, int64_t dims, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == dims && tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous(), name,
                  " must be contiguous int64 of ", dims, " dims");
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

// Whether to write rows past the caches. Rows must begin at cache lines.
bool streams_rows(const void* out, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes >= kStreamFromBytes && row_bytes % kLineBytes == 0 && is_line_aligned(out);
}

// ---- The order -----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> expert_order(const Tensor& experts, int64_t num_experts) {
  const int64_t* ids = indices(experts, 2, "experts");
  STD_TORCH_CHECK(num_experts > 0, "num_experts must be 1 or more");
  const int64_t num_pairs = experts.numel(), num_bins = num_experts + 1;  // the last bin: pairs that are dropped
  const Tensor rows = empty({&num_pairs, 1}, ScalarType::Long, experts);
  const Tensor places = empty(Sizes(experts), ScalarType::Long, experts);
  const Tensor counts = empty({&num_experts, 1}, ScalarType::Long, experts);
  auto* row_data = static_cast<int64_t*>(rows.mutable_data_ptr());
  auto* place_data = static_cast<int64_t*>(places.mutable_data_ptr());
  auto* count_data = static_cast<int64_t*>(counts.mutable_data_ptr());
  const int64_t parts = std::clamp<int64_t>(num_pairs / std::max<int64_t>(4096, 4 * num_bins), 1, 64);
  const auto bin_of = [&](int64_t id) { return id >= 0 && id < num_experts ? id : num_experts; };
  std::vector<int64_t> bins(static_cast<size_t>(parts * num_bins));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      int64_t* bin = bins.data() + part * num_bins;
      const int64_t end = part_begin(part + 1, parts, num_pairs);
      for (int64_t pair = part_begin(part, parts, num_pairs); pair < end; ++pair) ++bin[bin_of(ids[pair])];
    }
  });
  // From counts to first places: of expert e, the pairs of part 0, then those of part 1, ...
  int64_t place = 0;
  for (int64_t e = 0; e < num_bins; ++e) {
    const int64_t begin = place;
    for (int64_t part = 0; part < parts; ++part) {
      int64_t& bin = bins[static_cast<size_t>(part * num_bins + e)];
      const int64_t count = bin;
      bin = place;
      place += count;
    }
    if (e < num_experts) count_data[e] = place - begin;
  }
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      int64_t* next = bins.data() + part * num_bins;
      const int64_t end = part_begin(part + 1, parts, num_pairs);
      for (int64_t pair = part_begin(part, parts, num_pairs); pair < end; ++pair) {
        const int64_t at = next[bin_of(ids[pair])]++;
        row_data[at] = pair;
        place_data[pair] = at;
      }
    }
  });
  return {rows, places, counts};
}

// ---- Rows ----------------------------------------------------------------------------------------------------------

Tensor expert_permute(const Tensor& x_any, const Tensor& places, int64_t num_rows) {
  STD_TORCH_CHECK(x_any.dim() == 2 && num_rows >= 0, "x must be [T, H], and num_rows 0 or more");
  const Tensor x = made_contiguous(x_any);
  const int64_t* place_data = indices(places, 2, "places");
  const int64_t num_tokens = x.size(0), width = x.size(1), num_selected = places.size(1);
  STD_TORCH_CHECK(places.size(0) == num_tokens, "x must have a row for every token");
  const int64_t sizes[] = {num_rows, width};
  const Tensor out = empty(sizes, x.scalar_type(), x);
  const int64_t bytes = width * static_cast<int64_t>(x.element_size());
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const bool stream = streams_rows(to, num_rows, bytes) && is_line_aligned(from);
  torch::stable::parallel_for(0, num_tokens, rows_per_thread(bytes * num_selected), [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      for (int64_t pair = token * num_selected; pair < (token + 1) * num_selected; ++pair) {
        const int64_t place = place_data[pair];
        if (place < 0 || place >= num_rows) continue;
        if (stream) {
          stream_copy(to + place * bytes, from + token * bytes, bytes);
        } else {
          std::memcpy(to + place * bytes, from + token * bytes, bytes);
        }
      }
    }
    if (stream) finish_streaming();
  });
  return out;
}

const float* weights_of(const Tensor& weights, const Tensor& places) {
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.numel() == places.numel(),
                  "weights must be float32 [T, K]");
  return static_cast<const float*>(weights.const_data_ptr());
}

Tensor expert_combine(const Tensor& y_any, const Tensor& places, const OptionalTensor& weights_any) {
  STD_TORCH_CHECK(y_any.dim() == 2, "y must be [N, H]");
  check_kernel_dtype(y_any, "y");
  const Tensor y = made_contiguous(y_any);
  const int64_t* place_data = indices(places, 2, "places");
  const int64_t num_rows = y.size(0), width = y.size(1), num_tokens = places.size(0), num_selected = places.size(1);
  const OptionalTensor weights = weights_any ? OptionalTensor(made_contiguous(*weights_any)) : std::nullopt;
  const float* weight_data = weights ? weights_of(*weights, places) : nullptr;
  const int64_t sizes[] = {num_tokens, width};
  const Tensor out = empty(sizes, y.scalar_type(), y);
  for_cpu_dtype(y.scalar_type(), [&]<typename T>(T) {
    const T* from = static_cast<const T*>(y.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
    torch::stable::parallel_for(0, num_tokens, rows_per_thread(bytes * num_selected), [&](int64_t first, int64_t last) {
      // Two tokens: the one in work, and the next one, whose rows are prefetched.
      std::vector<const T*> pointers(static_cast<size_t>(2 * num_selected));
      std::vector<float> factors(static_cast<size_t>(2 * num_selected));
      const auto rows_of = [&](int64_t token) {
        const int64_t at = token % 2 * num_selected;
        TokenRows<T> found{pointers.data() + at, factors.data() + at, 0};
        if (token >= last) return found;
        for (int64_t pair = token * num_selected; pair < (token + 1) * num_selected; ++pair) {
          const int64_t place = place_data[pair];
          if (place < 0 || place >= num_rows) continue;
          found.rows[found.count] = from + place * width;
          found.weights[found.count++] = weight_data == nullptr ? 1.0f : weight_data[pair];
        }
        return found;
      };
      TokenRows<T> current = rows_of(first);
      for (int64_t token = first; token < last; ++token) {
        const TokenRows<T> next = rows_of(token + 1);
        combine_row(current, next, width, to + token * width);
        current = next;
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> expert_combine_backward(const Tensor& grad_any, const OptionalTensor& y_any,
                                                   const Tensor& places, const Tensor& weights_any, int64_t num_rows,
                                                   bool need_y) {
  STD_TORCH_CHECK(grad_any.dim() == 2 && num_rows >= 0, "grad must be [T, H], and num_rows 0 or more");
  check_kernel_dtype(grad_any, "grad");
  const Tensor grad = made_contiguous(grad_any), weights = made_contiguous(weights_any);
  const int64_t* place_data = indices(places, 2, "places");
  const int64_t num_tokens = places.size(0), num_selected = places.size(1), width = grad.size(1);
  STD_TORCH_CHECK(grad.size(0) == num_tokens, "grad must have a row for every token");
  const float* weight_data = weights_of(weights, places);
  const OptionalTensor y = y_any ? OptionalTensor(made_contiguous(*y_any)) : std::nullopt;
  STD_TORCH_CHECK(!y || (y->dim() == 2 && y->size(0) == num_rows && y->size(1) == width &&
                         y->scalar_type() == grad.scalar_type()),
                  "y must be [num_rows, H] in the dtype of grad");
  const int64_t sizes[] = {num_rows, width};
  const Tensor grad_y = need_y ? empty(sizes, grad.scalar_type(), grad) : nothing(grad);
  const Tensor grad_weights = y ? empty(Sizes(places), ScalarType::Float, grad) : nothing(weights);
  for_cpu_dtype(grad.scalar_type(), [&]<typename T>(T) {
    const T* g = static_cast<const T*>(grad.const_data_ptr());
    const T* y_data = y ? static_cast<const T*>(y->const_data_ptr()) : nullptr;
    T* to = need_y ? static_cast<T*>(grad_y.mutable_data_ptr()) : nullptr;
    float* dots = y ? static_cast<float*>(grad_weights.mutable_data_ptr()) : nullptr;
    const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
    const bool stream = need_y && streams_rows(to, num_rows, bytes);
    torch::stable::parallel_for(0, num_tokens, rows_per_thread(bytes * num_selected), [&](int64_t first, int64_t last) {
      for (int64_t pair = first * num_selected; pair < last * num_selected; ++pair) {
        const int64_t place = place_data[pair];
        const bool kept = place >= 0 && place < num_rows;
        if (y_data != nullptr && pair + 2 < last * num_selected) {
          prefetch_lines(y_data, place_data[pair + 2] * bytes, bytes);
        }
        const float dot = !kept ? 0.0f
                                : combine_row_backward(g + pair / num_selected * width,
                                                       y_data == nullptr ? nullptr : y_data + place * width,
                                                       weight_data[pair], width,
                                                       to == nullptr ? nullptr : to + place * width, stream);
        if (dots != nullptr) dots[pair] = dot;
      }
      if (stream) finish_streaming();
    });
  });
  return {grad_y, grad_weights};
}

}  // namespace
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) {
  m.impl("expert_order", TORCH_BOX(&fm::expert_order));
  m.impl("expert_permute", TORCH_BOX(&fm::expert_permute));
  m.impl("expert_combine", TORCH_BOX(&fm::expert_combine));
  m.impl("expert_combine_backward", TORCH_BOX(&fm::expert_combine_backward));
}

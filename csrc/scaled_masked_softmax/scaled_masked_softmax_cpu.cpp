// Softmax of scaled scores under a mask, on the CPU. The math is in fused_megatron/reference/scaled_masked_softmax.py.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "cpu/parameter.h"
#include "scaled_masked_softmax/scaled_masked_softmax_rows_cpu.h"
#include "tensor_checks.h"

namespace fm {
namespace {

// Results too large for a cache bypass the caches, which saves reading the lines before writing them.
constexpr int64_t kStreamFromBytes = int64_t{32} << 20;
constexpr int64_t kGrainElements = 16384;

// Scores as matrices of queries by keys, and the keys that the causal form lets a query see.
struct Scores {
  int64_t keys, queries, rows, window;
  bool causal;

  Scores(const Tensor& x, bool causal, int64_t window) : window(window), causal(causal) {
    STD_TORCH_CHECK(x.dim() > 0, "x must have a dimension of keys");
    STD_TORCH_CHECK(window >= 0 && (window == 0 || causal), "window must be positive and needs causal");
    keys = x.size(x.dim() - 1);
    queries = x.dim() > 1 ? x.size(x.dim() - 2) : 1;
    rows = keys > 0 ? x.numel() / keys : 0;
  }

  // The i-th row to work on. Blocks of rows come from both ends of a causal matrix in turn, since the last rows are the
  // longest: so all contiguous shares of rows are the same amount of work.
  int64_t row(int64_t i) const {
    constexpr int64_t kBlock = 16;
    const int64_t place = i % queries, block = place / kBlock, blocks = queries / kBlock;
    if (!causal || block >= blocks) return i;
    const int64_t from = block % 2 == 0 ? block / 2 : blocks - 1 - block / 2;
    return i + (from - block) * kBlock;
  }

  // The work of the i-th row, in a thread whose last row is `last`.
  Row work(int64_t i, int64_t last, double scale, bool stream) const {
    const int64_t here = row(i), to_next = i + 1 < last ? (row(i + 1) - here) * keys : 0;
    const int64_t past_last = causal ? here % queries + keys - queries + 1 : keys;
    const int64_t end = std::clamp<int64_t>(past_last, 0, keys);
    const int64_t begin = window > 0 ? std::clamp<int64_t>(past_last - window, 0, end) : 0;
    return {begin, end, keys, static_cast<float>(scale), stream, to_next};
  }

  int64_t grain() const { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, keys)); }
};

// A mask of any shape that broadcasts to the scores, read in place.
class MaskRows {
 public:
  MaskRows(const OptionalTensor& mask, const Tensor& x) {
    if (!mask) return;
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    STD_TORCH_CHECK(on_same_device(*mask, x), "mask must be on the device of x");
    STD_TORCH_CHECK(mask->dim() <= x.dim(), "mask must broadcast to x");
    data_ = static_cast<const uint8_t*>(mask->const_data_ptr());
    for (int64_t from_last = 1; from_last <= x.dim(); ++from_last) {
      const int64_t size = x.size(x.dim() - from_last), dim = mask->dim() - from_last;
      STD_TORCH_CHECK(dim < 0 || mask->size(dim) == size || mask->size(dim) == 1, "mask must broadcast to x");
      const int64_t stride = dim >= 0 && mask->size(dim) > 1 ? mask->stride(dim) : 0;
      if (from_last == 1) {
        keys_ = size;
        key_stride_ = stride;
      } else {
        dims_.push_back({size, stride});
      }
    }
  }

  bool needs_copy() const { return data_ != nullptr && key_stride_ != 1; }

  // The mask of a row, one byte for each key; copied only if the keys do not lie side by side.
  const uint8_t* row(int64_t row, uint8_t* copy) const {
    if (data_ == nullptr) return nullptr;
    const uint8_t* from = data_;
    for (const Dim& dim : dims_) {
      from += row % dim.size * dim.stride;
      row /= dim.size;
    }
    if (key_stride_ == 1) return from;
    for (int64_t j = 0; j < keys_; ++j) copy[j] = from[j * key_stride_];
    return copy;
  }

 private:
  struct Dim {
    int64_t size, stride;
  };
  const uint8_t* data_ = nullptr;
  std::vector<Dim> dims_;  // all dims except the keys, the last first
  int64_t keys_ = 0, key_stride_ = 1;
};

bool worth_streaming(const Tensor& x) { return x.numel() * static_cast<int64_t>(x.element_size()) >= kStreamFromBytes; }

// Orders streamed stores before the signal to other threads that this thread is done.
void finish_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

Tensor scaled_masked_softmax_forward(const Tensor& x_any, const OptionalTensor& mask, double scale, bool causal,
                                     int64_t window) {
  check_kernel_dtype(x_any, "x");
  const Tensor x = made_contiguous(x_any);
  const Scores scores(x, causal, window);
  const MaskRows masks(mask, x);
  Tensor y = empty(Sizes(x), x.scalar_type(), x);
  const bool stream = worth_streaming(x);
  for_cpu_dtype(x.scalar_type(), [&]<typename T>(T) {
    const T* in = static_cast<const T*>(x.const_data_ptr());
    T* out = static_cast<T*>(y.mutable_data_ptr());
    torch::stable::parallel_for(0, scores.rows, scores.grain(), [&](int64_t begin, int64_t end) {
      const Scratch memory = make_scratch(scores.keys + kLanes);
      std::vector<uint8_t> copy(masks.needs_copy() ? static_cast<size_t>(scores.keys) : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = scores.row(i);
        const Row work = scores.work(i, end, scale, stream);
        forward_row(in + row * scores.keys, masks.row(row, copy.data()), &work, memory.get(),
                    out + row * scores.keys);
      }
      finish_stream();
    });
  });
  return y;
}

Tensor scaled_masked_softmax_backward(const Tensor& dy_any, const Tensor& y_any, double scale, bool causal,
                                      int64_t window) {
  check_kernel_dtype(y_any, "y");
  STD_TORCH_CHECK(dy_any.scalar_type() == y_any.scalar_type() && dy_any.numel() == y_any.numel() &&
                      on_same_device(dy_any, y_any),
                  "dy must have the dtype, shape and device of y");
  const Tensor y = made_contiguous(y_any), dy = made_contiguous(dy_any);
  const Scores scores(y, causal, window);
  Tensor dx = empty(Sizes(y), y.scalar_type(), y);
  const bool stream = worth_streaming(y);
  for_cpu_dtype(y.scalar_type(), [&]<typename T>(T) {
    const T* dy_in = static_cast<const T*>(dy.const_data_ptr());
    const T* y_in = static_cast<const T*>(y.const_data_ptr());
    T* out = static_cast<T*>(dx.mutable_data_ptr());
    torch::stable::parallel_for(0, scores.rows, scores.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = scores.row(i) * scores.keys;
        const Row work = scores.work(i, end, scale, stream);
        backward_row(dy_in + at, y_in + at, &work, out + at);
      }
      finish_stream();
    });
  });
  return dx;
}

}  // namespace
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) {
  m.impl("scaled_masked_softmax_forward", TORCH_BOX(&fm::scaled_masked_softmax_forward));
  m.impl("scaled_masked_softmax_backward", TORCH_BOX(&fm::scaled_masked_softmax_backward));
}

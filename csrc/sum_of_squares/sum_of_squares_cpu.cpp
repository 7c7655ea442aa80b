// Sum of squares over float32 tensors on the CPU: chunks in parallel, then their sums in order.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/multiversion.h"

#include "checks.h"

namespace fm {
namespace {

constexpr int64_t kChunk = 16384, kGrainChunks = 2;
// Summed separately, so that an addition need not wait for the one before; in the same order at every vector width.
constexpr int kLanes = 32;

FM_MULTIVERSION double chunk_sum(const float* data, int64_t count) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const double wide = static_cast<double>(data[i + lane]);  // its square is exact
      lanes[lane] += wide * wide;
    }
  }
  for (int lane = 0; i + lane < count; ++lane) {
    const double wide = static_cast<double>(data[i + lane]);
    lanes[lane] += wide * wide;
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

Tensor sum_of_squares(std::vector<Tensor> tensors) {
  check_squares(tensors);
  double total = 0.0;
  std::vector<double> sums;
  for (const Tensor& tensor : tensors) {
    const auto* data = static_cast<const float*>(tensor.const_data_ptr());
    const int64_t count = tensor.numel(), chunks = (count + kChunk - 1) / kChunk;
    sums.resize(static_cast<size_t>(chunks));
    torch::stable::parallel_for(0, chunks, kGrainChunks, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * kChunk;
        sums[static_cast<size_t>(chunk)] = chunk_sum(data + first, std::min(kChunk, count - first));
      }
    });
    for (const double sum : sums) total += sum;
  }
  Tensor result = empty({}, ScalarType::Double, tensors[0]);
  *static_cast<double*>(result.mutable_data_ptr()) = total;
  return result;
}

}  // namespace
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m) { m.impl("sum_of_squares", TORCH_BOX(&fm::sum_of_squares)); }

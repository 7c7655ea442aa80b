// Sum of squares over float32 tensors on the GPU: one launch for each kSquaresTensors of them, and one for the end.

#include <vector>

#include "cuda/launch_checks.h"

#include "checks.h"
#include "kernels.cuh"

namespace fm {
namespace {

Tensor sum_of_squares(std::vector<Tensor> tensors) {
  check_squares(tensors);
  const DeviceGuard guard(tensors[0].get_device());
  const cudaStream_t stream = current_stream(tensors[0]);
  std::vector<SquaresTensors> launches(1);
  for (const Tensor& tensor : tensors) {
    if (tensor.numel() == 0) continue;
    int index = launches.back().blocks.add(tensor.numel());
    if (index < 0) index = launches.emplace_back().blocks.add(tensor.numel());
    launches.back().data[index] = static_cast<const float*>(tensor.const_data_ptr());
  }
  int64_t num_sums = 0;
  for (const SquaresTensors& launch : launches) num_sums += launch.blocks.num_blocks();
  Tensor sums = empty({&num_sums, 1}, ScalarType::Double, tensors[0]), total = empty({}, ScalarType::Double, tensors[0]);
  auto* next = static_cast<double*>(sums.mutable_data_ptr());
  for (const SquaresTensors launch : launches) {  // a copy on the stack, where the arguments of a kernel belong
    if (launch.blocks.num_blocks() == 0) continue;
    FM_LAUNCH(sum_of_squares_kernel<kSquaresWarps>, dim3(static_cast<unsigned>(launch.blocks.num_blocks())),
              dim3(kSquaresThreads), stream, launch, next);
    check_launch("sum_of_squares");
    next += launch.blocks.num_blocks();
  }
  FM_LAUNCH_AFTER(finish_sum_of_squares<kFinishWarps>, dim3(1), dim3(kFinishWarps * kWarpSize), stream,
                  static_cast<const double*>(sums.const_data_ptr()), num_sums,
                  static_cast<double*>(total.mutable_data_ptr()));
  check_launch("sum_of_squares");
  return total;
}

}  // namespace
}  // namespace fm

FM_CUDA_LIBRARY_IMPL(m) { m.impl("sum_of_squares", TORCH_BOX(&fm::sum_of_squares)); }

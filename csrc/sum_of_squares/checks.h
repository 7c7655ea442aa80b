// Checks of the tensors whose squares are summed, for the CPU and the GPU.
#pragma once

#include <vector>

#include "tensor_checks.h"

namespace fm {

inline void check_squares(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "tensors must have at least one");
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                        on_same_device(tensor, tensors[0]),
                    "tensors must be contiguous float32 tensors on one device");
  }
}

}  // namespace fm

// Checks of the tensors that an AdamW update takes, for the CPU and the GPU.
#pragma once

#include <vector>

#include "tensor_checks.h"

namespace fm {

inline void check_adamw(const std::vector<Tensor>& main, const std::vector<Tensor>& first,
                        const std::vector<Tensor>& second, const std::vector<Tensor>& gradient,
                        const std::vector<Tensor>& low, const Tensor& gradient_scale, const OptionalTensor& skip) {
  const size_t count = main.size();
  STD_TORCH_CHECK(first.size() == count && second.size() == count && gradient.size() == count &&
                      (low.empty() || low.size() == count),
                  "main, exp_avg, exp_avg_sq, gradient and low must be lists of one length");
  const auto is_like = [&](const Tensor& tensor, const Tensor& like) {
    return tensor.is_contiguous() && tensor.numel() == like.numel() && on_same_device(tensor, gradient_scale);
  };
  for (size_t i = 0; i < count; ++i) {
    for (const auto* list : {&main, &first, &second, &gradient}) {
      STD_TORCH_CHECK((*list)[i].scalar_type() == ScalarType::Float && is_like((*list)[i], main[i]),
                      "main, exp_avg, exp_avg_sq and gradient must be contiguous float32 tensors of the same sizes, on "
                      "the device of gradient_scale");
    }
    STD_TORCH_CHECK(low.empty() || (is_kernel_dtype(low[i].scalar_type()) && is_like(low[i], main[i]) &&
                                    low[i].scalar_type() == low[0].scalar_type()),
                    "low must be contiguous tensors of one dtype and of the sizes of main");
  }
  STD_TORCH_CHECK(gradient_scale.scalar_type() == ScalarType::Float && gradient_scale.numel() == 1,
                  "gradient_scale must be one float32 number");
  STD_TORCH_CHECK(!skip || (skip->scalar_type() == ScalarType::Bool && skip->numel() == 1 &&
                            on_same_device(*skip, gradient_scale)),
                  "skip must be one bool on the device of gradient_scale");
}

}  // namespace fm

// AdamW over lists of tensors on the GPU: one launch for each kAdamwTensors of them.

#include <vector>

#include "cuda/launch_checks.h"

#include "checks.h"
#include "kernels.cuh"

namespace fm {
namespace {

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

void adamw_(std::vector<Tensor> main, std::vector<Tensor> first, std::vector<Tensor> second,
            std::vector<Tensor> gradient, std::vector<Tensor> low, Tensor gradient_scale, OptionalTensor skip, double lr,
            double beta1, double beta2, double eps, double weight_decay, int64_t step, bool zero_gradient) {
  check_adamw(main, first, second, gradient, low, gradient_scale, skip);
  const DeviceGuard guard(gradient_scale.get_device());
  const AdamwFactors factors(lr, beta1, beta2, eps, weight_decay, static_cast<double>(step));
  const auto* scale = static_cast<const float*>(gradient_scale.const_data_ptr());
  const auto* skip_data = skip ? static_cast<const bool*>(skip->const_data_ptr()) : nullptr;
  const cudaStream_t stream = current_stream(gradient_scale);
  for (size_t next = 0; next < main.size();) {
    AdamwTensors tensors{};
    for (; next < main.size(); ++next) {
      if (main[next].numel() == 0) continue;
      const int i = tensors.blocks.add(main[next].numel());
      if (i < 0) break;
      tensors.main[i] = floats(main[next]);
      tensors.first[i] = floats(first[next]);
      tensors.second[i] = floats(second[next]);
      tensors.gradient[i] = floats(gradient[next]);
      tensors.low[i] = low.empty() ? nullptr : low[next].mutable_data_ptr();
    }
    const int blocks = tensors.blocks.num_blocks();
    if (blocks == 0) continue;
    for_device_dtype(device_dtype(low.empty() ? ScalarType::Float : low[0].scalar_type()), [&]<typename T>(T) {
      auto* kernel = adamw_kernel<T>;
      FM_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kAdamwThreads), stream, tensors, factors, scale,
                skip_data, zero_gradient);
    });
    check_launch("adamw_");
  }
}

}  // namespace
}  // namespace fm

FM_CUDA_LIBRARY_IMPL(m) { m.impl("adamw_", TORCH_BOX(&fm::adamw_)); }

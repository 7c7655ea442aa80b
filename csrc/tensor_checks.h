// Checks and allocations of tensors that every op makes before its kernel sees pointers.
//
// Python catches user errors, with better messages. These checks keep a direct call of torch.ops.fused_megatron from
// reading memory out of bounds.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <optional>
#include <span>

namespace fm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline constexpr int kMaxDims = 64;  // torch's own limit

inline Tensor made_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// An uninitialised contiguous tensor on the device of `like`. The C shim is several times cheaper than a call
// through the dispatcher.
inline Tensor empty(std::span<const int64_t> sizes, ScalarType dtype, const Tensor& like) {
  std::array<int64_t, kMaxDims> strides;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t shim_dtype, device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), shim_dtype, device_type, device_index,
                                                         &handle));
  return Tensor(handle);
}

// The sizes of a tensor, without its last `drop` dims.
struct Sizes {
  std::array<int64_t, kMaxDims> values;
  size_t count;
  explicit Sizes(const Tensor& tensor, int drop = 0) : count(static_cast<size_t>(tensor.dim() - drop)) {
    for (size_t i = 0; i < count; ++i) values[i] = tensor.size(static_cast<int64_t>(i));
  }
  operator std::span<const int64_t>() const { return {values.data(), count}; }
};

// The result of an op in place of a gradient that is not wanted.
inline Tensor nothing(const Tensor& like) {
  const int64_t zero = 0;
  return empty({&zero, 1}, like.scalar_type(), like);
}

inline bool is_kernel_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void check_kernel_dtype(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(is_kernel_dtype(tensor.scalar_type()), name, " must be float32, bfloat16 or float16");
}

inline bool on_same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device() == b.get_device();
}

// A parameter over the last dim of x: [width], of a kernel dtype, on the device of x; made contiguous.
inline OptionalTensor checked_parameter(const OptionalTensor& parameter, const Tensor& x, const char* name) {
  if (!parameter) return std::nullopt;
  check_kernel_dtype(*parameter, name);
  STD_TORCH_CHECK(x.dim() > 0 && parameter->numel() == x.size(x.dim() - 1), name,
                  " must have as many elements as the last dim of x");
  STD_TORCH_CHECK(on_same_device(*parameter, x), name, " must be on the device of x");
  return made_contiguous(*parameter);
}

}  // namespace fm

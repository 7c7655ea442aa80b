// The torch side of a launch: device guard, stream, number of multiprocessors, and the check for errors.
//
// torch's STD_CUDA_CHECK is not used: only the CUDA build of torch has its symbol, and this library must load with the
// CPU build as well.
#pragma once

#include <torch/csrc/stable/library.h>

#include "cuda/numbers.cuh"
#include "tensor_checks.h"

#ifndef FM_EMULATION
#include <torch/csrc/stable/accelerator.h>
#endif

namespace fm {

// Registers the kernels of a .cu file for CUDA tensors; in the emulation, for CPU tensors.
#ifdef FM_EMULATION
#define FM_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CPU, m)

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
  ~DeviceGuard() {}  // not trivial, so that an unused guard gives no warning
};
inline void check_launch(const char*) {}  // an emulated launch throws
inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
inline int multiprocessors() { return emulation::multiprocessors(); }
inline int64_t max_shared_bytes() { return 227 * 1024; }  // as on Hopper

#else
#define FM_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fused_megatron, CUDA, m)

using torch::stable::accelerator::DeviceGuard;

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the CUDA kernel did not start: ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  return static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(tensor.get_device()).nativeHandle());
}

// The number of multiprocessors of the current device; queried once a device, since the driver is slow.
inline int multiprocessors() {
  constexpr int kDevices = 64;
  static int counts[kDevices] = {};
  int device = 0;
  STD_TORCH_CHECK(cudaGetDevice(&device) == cudaSuccess && device < kDevices, "no current CUDA device");
  if (counts[device] == 0) cudaDeviceGetAttribute(&counts[device], cudaDevAttrMultiProcessorCount, device);
  return counts[device];
}

// The largest shared memory of a block on the current device; queried once a device.
inline int64_t max_shared_bytes() {
  constexpr int kDevices = 64;
  static int bytes[kDevices] = {};
  int device = 0;
  STD_TORCH_CHECK(cudaGetDevice(&device) == cudaSuccess && device < kDevices, "no current CUDA device");
  if (bytes[device] == 0) cudaDeviceGetAttribute(&bytes[device], cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes[device];
}

#endif

inline DType device_dtype(ScalarType dtype) {
  if (dtype == ScalarType::Float) return DType::kFloat32;
  return dtype == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat16;
}

inline ConstParameter const_parameter(const OptionalTensor& tensor) {
  if (!tensor) return {nullptr, DType::kFloat32};
  return {tensor->const_data_ptr(), device_dtype(tensor->scalar_type())};
}

inline MutableParameter mutable_parameter(const Tensor& tensor, bool needed) {
  return {needed ? tensor.mutable_data_ptr() : nullptr, device_dtype(tensor.scalar_type())};
}

}  // namespace fm

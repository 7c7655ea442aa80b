// layer_norm (kCentred) and rms_norm on the GPU: the functions from tensors to tensors.
#pragma once

#include "cuda/launch_checks.h"
#include "norm/backward.cuh"
#include "norm/forward.cuh"
#include "norm/inputs.h"
#include "norm/looped.cuh"

namespace fm {

// An upper bound of the static shared memory of the kernels.
inline constexpr int64_t kNormStaticShared = 1024;

inline NormDevice norm_device() { return {multiprocessors(), max_shared_bytes() - kNormStaticShared}; }

template <bool kCentred>
void launch_norm_forward(const NormForward& a, NormDevice device, cudaStream_t stream) {
  if (a.rows == 0) return;
  const int64_t count = a.dtype == DType::kFloat32 ? 4 : 8;
  bool wide = a.width % count == 0;
  for (const void* address : {a.x, a.residual, a.weight.data, a.bias.data, static_cast<const void*>(a.y),
                              static_cast<const void*>(a.total)}) {
    wide = wide && is_aligned(address);
  }
  bool done = false;
  if (a.width <= kNormMaxWidth && wide) {
    for_norm_streams(a.dtype, a.stream_dtype, [&]<typename In, typename Stream>(In, Stream) {
      done = try_forward<In, Stream, kCentred>(a, device, stream);
    });
  } else if (a.width <= kNormMaxWidth) {
    done = try_forward<AnyStream, AnyStream, kCentred>(a, device, stream);
  }
  if (!done) launch_forward_looped<kCentred>(a, wide, device, stream);
}

template <bool kCentred>
void launch_norm_backward(const NormBackward& a, NormDevice device, cudaStream_t stream) {
  const int64_t count = a.dtype == DType::kFloat32 ? 4 : 8;
  bool wide = a.width % count == 0;
  for (const void* address : {a.dy, a.x, a.dtotal, a.weight.data, static_cast<const void*>(a.dx),
                              static_cast<const void*>(a.dresidual)}) {
    wide = wide && is_aligned(address);
  }
  bool done = false;
  if (a.width <= kNormMaxWidth && wide) {
    for_norm_streams(a.dtype, a.stream_dtype, [&]<typename Dy, typename Stream>(Dy, Stream) {
      done = try_backward<Dy, Stream, kCentred>(a, device, stream);
    });
  } else if (a.width <= kNormMaxWidth) {
    done = try_backward<AnyStream, AnyStream, kCentred>(a, device, stream);
  }
  if (!done) launch_backward_looped<kCentred>(a, wide, device, stream);
  if (a.partials == nullptr) return;
  launch_finish_column_sums({a.partials, a.parts, (kCentred ? 2 : 1) * a.width, a.width, {a.dweight, a.dbias}}, stream);
}

struct NormForwardOutputs {
  Tensor y, mean, rstd, total;
};

template <bool kCentred>
NormForwardOutputs norm_forward_cuda(const NormForwardInputs& in, double eps, bool zero_centered_weight) {
  const Sizes sizes(in.x), row_sizes(in.x, 1);
  const ScalarType dtype = in.x.scalar_type();
  const ScalarType stream_dtype = in.residual ? in.residual->scalar_type() : dtype;
  Tensor y = empty(sizes, dtype, in.x), rstd = empty(row_sizes, ScalarType::Float, in.x);
  Tensor mean = kCentred ? empty(row_sizes, ScalarType::Float, in.x) : rstd;
  Tensor total = in.residual ? empty(sizes, stream_dtype, in.x) : nothing(in.x);
  launch_norm_forward<kCentred>(
      {device_dtype(dtype), device_dtype(stream_dtype), in.x.const_data_ptr(),
       in.residual ? in.residual->const_data_ptr() : nullptr, const_parameter(in.weight), const_parameter(in.bias),
       zero_centered_weight && in.weight ? 1.0f : 0.0f, y.mutable_data_ptr(),
       in.residual ? total.mutable_data_ptr() : nullptr, static_cast<float*>(mean.mutable_data_ptr()),
       static_cast<float*>(rstd.mutable_data_ptr()), in.rows, in.width, static_cast<float>(eps)},
      norm_device(), current_stream(in.x));
  return {y, mean, rstd, total};
}

struct NormBackwardOutputs {
  Tensor dx, dweight, dbias, dresidual;
};

template <bool kCentred>
NormBackwardOutputs norm_backward_cuda(const NormBackwardInputs& in, bool need_dx, bool need_dweight, bool need_dbias,
                                       bool need_dresidual, bool zero_centered_weight) {
  need_dweight = need_dweight && in.weight.has_value();
  need_dbias = need_dbias && in.bias.has_value();
  const bool need_sums = need_dweight || need_dbias;
  const ScalarType dtype = in.dy.scalar_type(), stream_dtype = in.x.scalar_type();
  Tensor dx = need_dx ? empty(Sizes(in.x), dtype, in.x) : nothing(in.dy);
  Tensor dweight = need_dweight ? empty(Sizes(*in.weight), in.weight->scalar_type(), in.x) : nothing(in.dy);
  Tensor dbias = need_dbias ? empty(Sizes(*in.bias), in.bias->scalar_type(), in.x) : nothing(in.dy);
  Tensor dresidual = need_dresidual ? empty(Sizes(in.x), stream_dtype, in.x) : nothing(in.x);
  if (!need_sums && ((!need_dx && !need_dresidual) || in.rows == 0)) return {dx, dweight, dbias, dresidual};
  const NormDevice device = norm_device();
  const int64_t size = dtype == ScalarType::Float ? 4 : 2, stream_size = stream_dtype == ScalarType::Float ? 4 : 2;
  const int64_t row_bytes = (1 + need_dx) * size + (1 + in.dtotal.has_value() + need_dresidual) * stream_size;
  const int64_t parts = need_sums ? norm_parts(in.rows, row_bytes, kCentred ? 2 : 1, device.multiprocessors)
                                  : norm_blocks(in.rows, device.multiprocessors);
  const int64_t partial_sizes[] = {need_sums ? parts * (kCentred ? 2 : 1) * in.width : 0};
  Tensor partials = empty(partial_sizes, ScalarType::Float, in.x);
  launch_norm_backward<kCentred>(
      {device_dtype(dtype), device_dtype(stream_dtype), in.dy.const_data_ptr(), in.x.const_data_ptr(),
       in.dtotal ? in.dtotal->const_data_ptr() : nullptr, const_parameter(in.weight),
       zero_centered_weight && in.weight ? 1.0f : 0.0f,
       in.mean ? static_cast<const float*>(in.mean->const_data_ptr()) : nullptr,
       static_cast<const float*>(in.rstd.const_data_ptr()), need_dx ? dx.mutable_data_ptr() : nullptr,
       need_dresidual ? dresidual.mutable_data_ptr() : nullptr,
       need_sums ? static_cast<float*>(partials.mutable_data_ptr()) : nullptr, in.rows, in.width, parts,
       mutable_parameter(dweight, need_dweight), mutable_parameter(dbias, need_dbias)},
      device, current_stream(in.x));
  return {dx, dweight, dbias, dresidual};
}

}  // namespace fm

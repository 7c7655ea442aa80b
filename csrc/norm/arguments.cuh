// Arguments of the CUDA kernels of layer_norm (centred) and rms_norm: plain pointers, without torch.
//
// All matrices are [rows, width]. x, y, dy and dx have dtype; residual, total, dtotal and dresidual have stream_dtype,
// in which the norm is computed from its input.
#pragma once

#include <cstdint>

#include "cuda/numbers.cuh"

namespace fm {

struct NormForward {
  DType dtype, stream_dtype;
  const void* x;
  const void* residual;  // null: none; then x itself is normalised, and the two dtypes are equal
  ConstParameter weight, bias;
  float weight_offset;  // 1 for a zero-centred weight, else 0
  void* y;
  void* total;
  float* mean;  // null unless centred
  float* rstd;
  int64_t rows, width;
  float eps;
};

struct NormBackward {
  DType dtype, stream_dtype;
  const void* dy;
  const void* x;       // the normalised input, in stream_dtype
  const void* dtotal;  // null: none
  ConstParameter weight;
  float weight_offset;
  const float* mean;  // null unless centred
  const float* rstd;
  void* dx;         // null: not wanted
  void* dresidual;  // null: not wanted
  float* partials;  // [parts, 2 (1 unless centred), width]: sums of dy * normalised, then of dy; null: not wanted
  int64_t rows, width, parts;
  MutableParameter dweight, dbias;
};

}  // namespace fm

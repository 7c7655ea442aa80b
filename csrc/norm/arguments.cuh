// Arguments of the CUDA kernels of layer_norm (centred) and rms_norm: plain pointers, no torch.
//
// All matrices are [rows, width]. dtype: of x, y, dy and dx; stream_dtype: of what is normalised, that is of residual,
// total, dtotal and dresidual.
#pragma once

#include <cstdint>

#include "cuda/numbers.cuh"

namespace fm {

struct NormForward {
  DType dtype, stream_dtype;
  const void* x;
  const void* residual;  // null: none; x is normalised itself, and the two dtypes are one
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
  const void* x;       // what was normalised, in stream_dtype
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

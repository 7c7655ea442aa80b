#pragma once

#include <cstdint>

#include "device_numbers.cuh"

// What the layer norm kernels take: plain pointers, no torch. x, y, dy and dx are [rows, width].
namespace fm {

struct LayerNormForward {
  DType dtype;
  const void* x;
  ConstParameter weight, bias;
  void* y;
  float* mean;
  float* rstd;
  int64_t rows, width;
  float eps;
};

struct LayerNormBackward {
  DType dtype;
  const void* dy;
  const void* x;
  ConstParameter weight;
  const float* mean;
  const float* rstd;
  void* dx;         // null: not wanted
  float* partials;  // [parts, 2, width]: sums of dy * normalised, then of dy; null: not wanted
  int64_t rows, width, parts;
  MutableParameter dweight, dbias;
};

}  // namespace fm

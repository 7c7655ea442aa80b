// Global indices of the rows of a slice in the whole tensor from which it was cut.
//
// The random word of an element depends on its global index.
#pragma once

#include <cstdint>

#include "inlining.h"

namespace fm {

struct GlobalRows {
  int64_t inner;  // 0: the whole tensor
  int64_t start, stride0, stride1;
};

FM_INLINE int64_t first_index(const GlobalRows& rows, int64_t row, int64_t width) {
  if (rows.inner == 0) return row * width;
  if (rows.inner == 1) return rows.start + row * rows.stride0;
  // 64-bit divisions are slow, especially on a GPU.
  const bool small = (row | rows.inner) >> 32 == 0;
  const int64_t outer = small ? static_cast<uint32_t>(row) / static_cast<uint32_t>(rows.inner) : row / rows.inner;
  return rows.start + outer * rows.stride0 + (row - outer * rows.inner) * rows.stride1;
}

}  // namespace fm

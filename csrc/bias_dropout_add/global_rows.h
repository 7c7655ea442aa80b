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

// first_index of one row after the other, `step` rows apart, without a division or a multiplication a row.
class RunningRow {
 public:
  FM_INLINE RunningRow(const GlobalRows& rows, int64_t row, int64_t step, int64_t width)
      : index_(first_index(rows, row, width)), inner_(rows.inner) {
    if (inner_ == 0) {
      jump_ = step * width;
    } else {
      jump_ = step / inner_ * rows.stride0 + step % inner_ * rows.stride1;
      carry_ = rows.stride0 - inner_ * rows.stride1;
      place_ = row % inner_;
      place_step_ = step % inner_;
    }
  }
  FM_INLINE int64_t index() const { return index_; }
  FM_INLINE void advance() {
    index_ += jump_;
    if (inner_ <= 1) return;
    place_ += place_step_;
    if (place_ < inner_) return;
    place_ -= inner_;
    index_ += carry_;
  }

 private:
  int64_t index_, inner_, jump_, carry_ = 0, place_ = 0, place_step_ = 0;
};

}  // namespace fm

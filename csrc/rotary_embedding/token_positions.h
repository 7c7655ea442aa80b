// The row of the cos and sin tables for a token, on the CPU and the GPU.
#pragma once

#include <cstdint>

#include "inlining.h"

namespace fm {

// Tokens have two indices, i0 and i1 (i1 = 0 for packed tokens); sequence_dim says which one runs along a sequence.
struct TokenPositions {
  int64_t start;                           // added to every counted position
  const int64_t* positions;                // null: positions are counted
  int64_t positions_stride0, positions_stride1;
  const int64_t* offset;                   // null: 0
  int64_t offset_stride;                   // 0: one offset for all; 1: one for each sequence
  const void* cu_seqlens;                  // null: not packed
  bool cu_seqlens_is_64;
  int64_t num_sequences;
  int64_t table_rows;
  int32_t sequence_dim;
};

FM_INLINE int64_t sequence_begin(const TokenPositions& p, int64_t sequence) {
  return p.cu_seqlens_is_64 ? static_cast<const int64_t*>(p.cu_seqlens)[sequence]
                            : static_cast<const int32_t*>(p.cu_seqlens)[sequence];
}

// Returns the row, or -1 if the tables have none or no sequence holds a packed token: such tokens become NaN.
FM_INLINE int64_t token_position(const TokenPositions& p, int64_t i0, int64_t i1) {
  int64_t position;
  if (p.positions != nullptr) {
    position = p.positions[i0 * p.positions_stride0 + i1 * p.positions_stride1];
  } else if (p.cu_seqlens != nullptr) {
    // The last sequence that begins at or before the token. An empty sequence begins where the next one does.
    int64_t low = 0, high = p.num_sequences;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (sequence_begin(p, middle) <= i0) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    if (low == p.num_sequences || sequence_begin(p, low) > i0) return -1;
    position = i0 - sequence_begin(p, low) + p.start;
    if (p.offset != nullptr) position += p.offset[low * p.offset_stride];
  } else {
    position = (p.sequence_dim == 0 ? i0 : i1) + p.start;
    if (p.offset != nullptr) position += p.offset[(p.sequence_dim == 0 ? i1 : i0) * p.offset_stride];
  }
  return position >= 0 && position < p.table_rows ? position : -1;
}

}  // namespace fm

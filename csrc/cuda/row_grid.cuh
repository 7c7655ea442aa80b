// Grids of kernels whose blocks walk down rows: how many blocks share the rows, and which rows a block has.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"

namespace fm {

// Blocks with consecutive rows: as many each, or one more. With fixed strides of several rows some blocks would have a
// stride more than others, and the device would wait for them.
struct RowShares {
  int64_t blocks, least, longer;  // the first `longer` blocks have least + 1 rows, the others `least`

  static RowShares of(int64_t rows, int64_t blocks) { return {blocks, rows / blocks, rows % blocks}; }
  int64_t most() const { return least + (longer > 0); }
  FM_DEVICE int64_t begin(int64_t block) const { return block * least + (block < longer ? block : longer); }
  FM_DEVICE int64_t end(int64_t block) const { return begin(block + 1); }
};

// Blocks run in waves of `slots`, as many as fit on the device. `blocks_x` blocks lie side by side along the columns.
struct RowGrid {
  int64_t rows, threads_y, rows_in_flight;  // rows that a block has in work, and each of its threads
  int64_t blocks_x, slots;
  int64_t bytes, extra;  // bytes a column: of a row; of a block, whatever its rows (parameters, partial sums)

  int64_t waves(const RowShares& shares) const { return (shares.blocks * blocks_x + slots - 1) / slots; }
  // Bytes a column that a slot moves: in every wave as many as the block with most rows.
  int64_t bytes_of_slot(const RowShares& shares) const { return waves(shares) * (shares.most() * bytes + extra); }

  // The share of the rows for which the number of blocks is rounded down to whole waves. If one wave is enough, a
  // thread may have a single row.
  RowShares shares_of(int64_t num_waves) const {
    const int64_t needed = num_waves == 1 ? threads_y : threads_y * rows_in_flight;
    const int64_t useful = std::clamp<int64_t>((rows + needed - 1) / needed, 1, 65535);
    return RowShares::of(rows, std::clamp<int64_t>(num_waves * slots / blocks_x, 1, useful));
  }

  // Four waves, which balance better than one. Another number of waves if a slot then moves at least 1 % less: fewer,
  // if the extra bytes of a block count; more, if blocks_x leaves slots of the last wave empty.
  RowShares shares() const {
    RowShares best = shares_of(4);
    for (const int num_waves : {3, 2, 1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}) {
      const RowShares other = shares_of(num_waves);
      if (100 * bytes_of_slot(other) <= 99 * bytes_of_slot(best)) best = other;
    }
    return best;
  }
};

}  // namespace fm

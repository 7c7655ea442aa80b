"""Division of a sequence over context-parallel ranks, with equal tokens and, where asked, equal attention work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fused_megatron.checks import check, check_divisible, check_positive
from fused_megatron.sharding.sequence_layout import SequenceLayout

# A contiguous division whose largest work exceeds the mean by no more than this share is taken: under a window and
# under short documents, ranks with one range of positions need the fewest keys of other ranks.
_EVEN_ENOUGH = 0.01
# A window around the end whose work is this close to the mean is preferred to a closer window elsewhere: it leaves the
# other positions in one piece, so that every rank has few ranges.
_CLOSE = 0.001


@dataclass(frozen=True)
class SequencePartition:
    """The positions of a sequence that each of several ranks holds; every position belongs to exactly one rank.

    Example: seq_len=8 on 2 ranks, for causal attention: the layouts have the ranges ((0, 2), (6, 8)) and ((2, 6),).

    Attributes:
        layouts: the positions of each rank, in the order of the ranks.
    """

    layouts: tuple[SequenceLayout, ...]

    def __post_init__(self) -> None:
        check(len(self.layouts) >= 1, "layouts=() must have a layout for each rank")
        end = 0
        for start, stop in sorted(each for layout in self.layouts for each in layout.ranges):
            check(
                start == end, f"layouts must hold each position once, but position {min(start, end)} is held otherwise"
            )
            end = stop
        lengths = {layout.seq_len for layout in self.layouts}
        check(lengths == {end}, f"layouts must hold all seq_len={sorted(lengths)} positions, but they hold {end}")

    @classmethod
    def contiguous(cls, seq_len: int, num_ranks: int, multiple_of: int = 1) -> SequencePartition:
        """Return the partition into one block of neighbouring positions for each rank.

        Args:
            seq_len: S.
            num_ranks: number of ranks.
            multiple_of: divisor of the number of positions of each rank; the sizes differ by at most this number.

        Raises:
            InputError: multiple_of does not divide seq_len, or a rank would have no position.
        """
        ends = np.cumsum([0, *partition_sizes(seq_len, num_ranks, multiple_of)]).tolist()
        return cls(tuple(SequenceLayout(seq_len, (block,)) for block in pairwise(ends)))

    @property
    def seq_len(self) -> int:
        """S, the length of the whole sequence."""
        return self.layouts[0].seq_len

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return len(self.layouts)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of positions of each rank."""
        return tuple(layout.num_positions for layout in self.layouts)

    @cached_property
    def order(self) -> tuple[tuple[int, int, int], ...]:
        """(rank, first row, last row + 1) of each run of positions, in the order of the positions."""
        runs = ((position, rank, rows) for rank, layout in enumerate(self.layouts) for rows, position in layout.runs)
        return tuple((rank, rows.start, rows.stop) for _, rank, rows in sorted(runs, key=lambda run: run[0]))

    def work(self, work: npt.NDArray[np.int64]) -> list[int]:
        """Return each rank's sum of `work` [S], the work of each position."""
        return [sum(int(work[start:stop].sum()) for start, stop in layout.ranges) for layout in self.layouts]

    def blocks(self, count: int, multiple_of: int = 1) -> SequencePartition:
        """Return the partition over num_ranks x count ranks in which `count` neighbours share the rows of each rank.

        The rows of a rank are cut in their order into `count` blocks whose sizes differ by at most multiple_of.

        Raises:
            InputError: multiple_of does not divide the rows of a rank, or a rank would have no position.
        """
        layouts = []
        for layout in self.layouts:
            ends = np.cumsum([0, *partition_sizes(layout.num_positions, count, multiple_of)]).tolist()
            layouts += [layout.rows(first, end) for first, end in pairwise(ends)]
        return SequencePartition(tuple(layouts))


def partition_sizes(seq_len: int, num_ranks: int, multiple_of: int = 1) -> tuple[int, ...]:
    """Return the number of positions of each rank; the sizes differ by at most multiple_of, the first are larger.

    Raises:
        InputError: multiple_of does not divide seq_len, or a rank would have no position.
    """
    check_positive("num_ranks", num_ranks)
    check_divisible("seq_len", seq_len, "multiple_of", multiple_of)
    most = seq_len // multiple_of
    check(
        num_ranks <= most,
        f"seq_len={seq_len} on {num_ranks} context-parallel ranks leaves a rank without tokens "
        f"(use at most {most} ranks, or a longer sequence)",
    )
    each, more = divmod(most, num_ranks)
    return tuple((each + (rank < more)) * multiple_of for rank in range(num_ranks))


def balanced_partition(work: npt.NDArray[np.int64], num_ranks: int, multiple_of: int = 1) -> SequencePartition:
    """Return a partition whose ranks have equal tokens and, as nearly as positions allow, equal work.

    If one block of neighbouring positions for each rank is even to 1 %, that is the partition. Otherwise each rank in
    turn takes the cyclic window of the positions that are left whose work is nearest the mean. The mean work of all
    cyclic windows of S / n positions is total / n, and two neighbouring windows differ by two positions. So some window
    has the mean work, up to the work of one position. Windows around the end are preferred. For one causal document
    they give the zig-zag: rank r has block r from the start and block r from the end, of 2n blocks.

    Args:
        work: [S] int64, the work of each position, for example ops.visible_pairs.pairs_of_positions.
        num_ranks: n, the number of ranks.
        multiple_of: divisor of the number of positions of each rank. The sizes depend on S, num_ranks and multiple_of
            only, never on the work.

    Returns:
        The partition. Ranges of a rank ascend and do not touch.

    Raises:
        InputError: as SequencePartition.contiguous.

    Cost: O(S n) on the host; no device is involved.
    """
    seq_len = len(work)
    contiguous = SequencePartition.contiguous(seq_len, num_ranks, multiple_of)
    loads, total = contiguous.work(work), int(work.sum())
    if max(loads) * num_ranks <= (1 + _EVEN_ENOUGH) * total or total == 0:
        return contiguous
    rest = SequenceLayout.whole(seq_len)
    layouts = []
    for rank, size in enumerate(contiguous.sizes):
        count = rest.num_positions
        first = _window_nearest_mean(
            np.concatenate([work[start:stop] for start, stop in rest.ranges]), size, num_ranks - rank
        )
        wrapped = max(first + size - count, 0)
        taken = rest.rows(0, wrapped).ranges + rest.rows(first, min(first + size, count)).ranges
        layouts.append(SequenceLayout(seq_len, joined_ranges(sorted(taken))))
        rest = SequenceLayout(seq_len, rest.rows(wrapped, first).ranges + rest.rows(first + size, count).ranges)
    return SequencePartition(tuple(layouts))


def _window_nearest_mean(work: npt.NDArray[np.int64], size: int, ranks: int) -> int:
    """Return the first index of the cyclic window of `size` positions whose work is nearest the mean of the ranks."""
    count = len(work)
    if size == count:
        return 0
    sums = np.concatenate([[0], np.cumsum(np.concatenate([work, work[:size]]))])
    # In units of 1 / ranks, so that all numbers are whole.
    distance = np.abs((sums[size : size + count] - sums[:count]) * ranks - sums[count])
    around_end = count - size + int(np.argmin(distance[count - size :]))
    if distance[around_end] <= max(int(distance.min()), int(_CLOSE * sums[count])):
        return around_end
    return int(np.argmin(distance))


def joined_ranges(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the ranges in their order; a range that begins where the one before it ends is joined to it."""
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)

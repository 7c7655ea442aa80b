"""Positions of a sequence that a rank holds, as ranges: the whole sequence, one block, or several."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fused_megatron.checks import check, check_divisible


@dataclass(frozen=True)
class SequenceLayout:
    """Positions in the whole sequence of the rows that a rank holds, in the order of the rows.

    Example: with seq_len=8 and ranges=((0, 2), (6, 8)) the rows of a tensor [4, B, H] have the positions 0, 1, 6, 7.

    Attributes:
        seq_len: S, the length of the whole sequence.
        ranges: (start, stop) of each run of positions; no two overlap.
    """

    seq_len: int
    ranges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        end = 0
        for start, stop in sorted(self.ranges):
            check(
                end <= start <= stop <= self.seq_len,
                f"ranges={self.ranges} must lie in [0, seq_len={self.seq_len}) and not overlap",
            )
            end = stop

    @classmethod
    def whole(cls, seq_len: int) -> SequenceLayout:
        """Return the layout of a rank that holds all positions."""
        return cls(seq_len, ((0, seq_len),))

    @classmethod
    def zigzag(cls, seq_len: int, rank: int, num_ranks: int) -> SequenceLayout:
        """Return the layout with block `rank` from the start and block `rank` from the end, of 2 num_ranks blocks.

        Under causal attention every rank then has the same work.

        Raises:
            InputError: 2 num_ranks does not divide seq_len.
        """
        check_divisible("seq_len", seq_len, "2 x num_ranks", 2 * num_ranks)
        size = seq_len // (2 * num_ranks)
        starts = (rank * size, (2 * num_ranks - 1 - rank) * size)
        return cls(seq_len, tuple((start, start + size) for start in starts))

    @property
    def num_positions(self) -> int:
        """Number of rows that the rank holds."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def runs(self) -> tuple[tuple[slice, int], ...]:
        """For each range its rows, and the position of its first row."""
        found, row = [], 0
        for start, stop in self.ranges:
            found.append((slice(row, row + stop - start), start))
            row += stop - start
        return tuple(found)

    def block(self, index: int, count: int) -> SequenceLayout:
        """Return the layout of block `index` of `count` equal blocks of these rows: a sequence-parallel rank's shard.

        Raises:
            InputError: count does not divide the number of rows.
        """
        check_divisible("sequence length", self.num_positions, "tensor_parallel_size", count)
        size = self.num_positions // count
        return self.rows(index * size, (index + 1) * size)

    def rows(self, first: int, end: int) -> SequenceLayout:
        """Return the layout of the rows first to end."""
        cut = [
            (start + max(first - rows.start, 0), start + min(end, rows.stop) - rows.start) for rows, start in self.runs
        ]
        return SequenceLayout(self.seq_len, tuple((start, stop) for start, stop in cut if start < stop))

    def positions(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the position of every row, [num_positions] int64."""
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in self.ranges])

    def take(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Return the rank's rows of a tensor with the whole sequence (or more) in `dim`; for one range a view."""
        parts = [x.narrow(dim, start, stop - start) for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

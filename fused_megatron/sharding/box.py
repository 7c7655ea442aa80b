"""Boxes: axis-aligned blocks of a full tensor. Whatever the layout, a shard is a box, and a load intersects boxes."""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

_PRIME = (1 << 61) - 1
_MOST_PAIRS = 20_000  # a fraction of a second


@dataclass(frozen=True)
class TensorBox:
    """This rank's part of a full tensor: `full[offset : offset + tensor.shape]` in every dim.

    Args:
        tensor: any dtype and strides. The local data that exists in the full tensor, without padding. To leave padding
            rows out, pass a view without them.
        full_shape: shape of the full tensor.
        offset: where in the full tensor the first element lies; one int a dim.
    """

    tensor: torch.Tensor
    full_shape: tuple[int, ...]
    offset: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> TensorBox:
        """A tensor that is not sharded (held alone, or replicated)."""
        return cls(tensor, tuple(tensor.shape), (0,) * tensor.dim())

    @property
    def box(self) -> Box:
        return Box(tuple(self.offset), tuple(self.tensor.shape))

    def values(self) -> torch.Tensor:
        """The numbers to save."""
        return self.tensor


@dataclass(frozen=True)
class StreamedBox(TensorBox):
    """A box to save whose numbers are read when it is its turn, and dropped after.

    Args:
        tensor: stands for shape and dtype; on the meta device.
        read: the numbers.
    """

    read: Callable[[], torch.Tensor]

    def values(self) -> torch.Tensor:
        """The numbers to save."""
        found = self.read()
        assert (found.shape, found.dtype) == (self.tensor.shape, self.tensor.dtype)
        return found


@dataclass(frozen=True, order=True)
class Box:
    """Offset and shape of a block; a 0-dim tensor is the box of no dims and one element."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        return math.prod(self.shape)

    def lies_in(self, full_shape: Sequence[int]) -> bool:
        """Whether all of its elements are in the full tensor; of none this is true, wherever they would begin."""
        if (
            not len(self.offset) == len(self.shape) == len(full_shape)
            or min((*self.offset, *self.shape), default=0) < 0
        ):
            return False
        ends = zip(self.offset, self.shape, full_shape, strict=True)
        return 0 in self.shape or all(start + size <= full for start, size, full in ends)

    def intersect(self, other: Box) -> Box | None:
        """What both cover; None where that is nothing."""
        starts = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        ends = (
            min(a + m, b + n) for a, m, b, n in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        box = Box(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))
        return box if all(s > 0 for s in box.shape) else None

    def slices(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """Index of this box in a tensor whose first element lies at origin; None: in the full tensor."""
        origin = (0,) * len(self.shape) if origin is None else origin
        return tuple(slice(o - z, o - z + s) for o, s, z in zip(self.offset, self.shape, origin, strict=True))


def cover_problem(full_shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Why the boxes (none of them empty) do not cover the full tensor exactly once; None where they do.

    In time that grows with the number of boxes and not with its square: thousands of a stranger's must not hold a
    reader up. Boxes that cover a tensor exactly once fill its volume whatever distance lies between two neighbouring
    cuts. Others do so only for distances that solve an equation, which random ones do not: of all draws less than
    dims / 2^61.
    """
    for box in boxes:
        if not box.lies_in(full_shape):
            return f"the box at {box.offset} of shape {box.shape} is not inside the full shape {tuple(full_shape)}"
    draw = random.Random(secrets.randbits(128))
    places: list[dict[int, int]] = [{} for _ in full_shape]  # of a coordinate in each dim

    def measure(box: Box) -> int:
        volume = 1
        for known, start, size in zip(places, box.offset, box.shape, strict=True):
            low, high = (known.setdefault(x, draw.randrange(_PRIME)) for x in (start, start + size))
            volume = volume * (high - low) % _PRIME
        return volume

    whole = Box((0,) * len(full_shape), tuple(full_shape))
    if sum(map(measure, boxes)) % _PRIME == measure(whole):
        return None
    missing = whole.volume - sum(box.volume for box in boxes)
    return _overlap(boxes) or f"{missing} of {whole.volume} elements are in no box"


def _overlap(boxes: Sequence[Box]) -> str | None:
    """Two boxes that overlap; the search ends after some thousand pairs, with a word of it where there must be some."""
    ordered, pairs = sorted(boxes), 0
    for i, box in enumerate(ordered):
        for later in ordered[i + 1 :]:
            if box.offset and later.offset[0] >= box.offset[0] + box.shape[0]:
                break  # sorted by the first dim: all that follow start beyond this box
            if box.intersect(later):
                return (
                    f"the box at {box.offset} of shape {box.shape} and the one at {later.offset} of shape "
                    f"{later.shape} overlap"
                )
            pairs += 1
            if pairs == _MOST_PAIRS:
                return f"its {len(boxes)} boxes overlap, or leave holes"
    return None


def row_blocks(shape: Sequence[int], itemsize: int, limit_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, stop) over the first dim, each block of at most limit_bytes (but at least one row)."""
    num_rows = shape[0] if shape else 1
    row_bytes = math.prod(shape[1:]) * itemsize
    rows_per_block = max(1, limit_bytes // max(1, row_bytes))
    for start in range(0, num_rows if row_bytes else 0, rows_per_block):
        yield start, min(start + rows_per_block, num_rows)

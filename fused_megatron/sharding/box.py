"""Boxes: axis-aligned blocks of a full tensor.

In every layout a shard is a box, so a checkpoint is loaded by intersecting the boxes of two layouts.
"""

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
        tensor: any dtype and strides; the local data without padding. To leave padding rows out, pass a view.
        full_shape: shape of the full tensor.
        offset: index in the full tensor of the first element; one int for each dim.
    """

    tensor: torch.Tensor
    full_shape: tuple[int, ...]
    offset: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> TensorBox:
        """Return the box of a tensor that is not sharded (one rank holds it, or every rank holds a copy)."""
        return cls(tensor, tuple(tensor.shape), (0,) * tensor.dim())

    @property
    def box(self) -> Box:
        return Box(tuple(self.offset), tuple(self.tensor.shape))

    def values(self) -> torch.Tensor:
        """Return the values to save."""
        return self.tensor


@dataclass(frozen=True)
class StreamedBox(TensorBox):
    """A box whose values are read when it is saved, and not kept.

    Args:
        tensor: shape and dtype; on the meta device.
        read: returns the values.
    """

    read: Callable[[], torch.Tensor]

    def values(self) -> torch.Tensor:
        """Read and return the values to save."""
        found = self.read()
        assert (found.shape, found.dtype) == (self.tensor.shape, self.tensor.dtype)
        return found


@dataclass(frozen=True, order=True)
class Box:
    """Offset and shape of a block. A 0-dim tensor is a box with no dims and one element."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        return math.prod(self.shape)

    def lies_in(self, full_shape: Sequence[int]) -> bool:
        """Whether every element is in the full tensor. A box without elements lies in it at any offset."""
        if (
            not len(self.offset) == len(self.shape) == len(full_shape)
            or min((*self.offset, *self.shape), default=0) < 0
        ):
            return False
        ends = zip(self.offset, self.shape, full_shape, strict=True)
        return 0 in self.shape or all(start + size <= full for start, size, full in ends)

    def intersect(self, other: Box) -> Box | None:
        """Return the block that both boxes cover; None if there is none."""
        starts = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        ends = (
            min(a + m, b + n) for a, m, b, n in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        box = Box(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))
        return box if all(s > 0 for s in box.shape) else None

    def slices(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """Return the index of this box in a tensor that starts at origin of the full one; None: the full tensor."""
        origin = (0,) * len(self.shape) if origin is None else origin
        return tuple(slice(o - z, o - z + s) for o, s, z in zip(self.offset, self.shape, origin, strict=True))


def cover_problem(full_shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Say why the boxes (none of them empty) do not cover the full tensor exactly once; return None if they do.

    The time is linear in the number of boxes, so that a file of a stranger with thousands of boxes takes no long time.
    Boxes that cover a tensor exactly once fill its volume for any distances between neighbouring cuts. Other boxes do
    so only for distances that solve an equation. Random distances solve it with a probability below dims / 2^61.
    """
    for box in boxes:
        if not box.lies_in(full_shape):
            return f"the box at {box.offset} of shape {box.shape} is not inside the full shape {tuple(full_shape)}"
    draw = random.Random(secrets.randbits(128))
    random_edges: list[dict[int, int]] = [{} for _ in full_shape]  # for each dim: coordinate -> random coordinate

    def measure(box: Box) -> int:
        volume = 1
        for known, start, size in zip(random_edges, box.offset, box.shape, strict=True):
            low, high = (known.setdefault(x, draw.randrange(_PRIME)) for x in (start, start + size))
            volume = volume * (high - low) % _PRIME
        return volume

    whole = Box((0,) * len(full_shape), tuple(full_shape))
    if sum(map(measure, boxes)) % _PRIME == measure(whole):
        return None
    missing = whole.volume - sum(box.volume for box in boxes)
    return _overlap(boxes) or f"{missing} of {whole.volume} elements are in no box"


def _overlap(boxes: Sequence[Box]) -> str | None:
    """Describe two boxes that overlap; after some thousand pairs say only that boxes overlap or leave holes."""
    ordered, pairs = sorted(boxes), 0
    for i, box in enumerate(ordered):
        for later in ordered[i + 1 :]:
            if box.offset and later.offset[0] >= box.offset[0] + box.shape[0]:
                break  # sorted by the first dim: all that follow start beyond this box
            if box.intersect(later):
                return (
                    f"the box at {box.offset} of shape {box.shape} and the box at {later.offset} of shape "
                    f"{later.shape} overlap"
                )
            pairs += 1
            if pairs == _MOST_PAIRS:
                return f"its {len(boxes)} boxes overlap, or leave holes"
    return None


def row_blocks(shape: Sequence[int], itemsize: int, limit_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) over the first dim: blocks of at most limit_bytes, but of at least one row."""
    num_rows = shape[0] if shape else 1
    row_bytes = math.prod(shape[1:]) * itemsize
    rows_per_block = max(1, limit_bytes // max(1, row_bytes))
    for start in range(0, num_rows if row_bytes else 0, rows_per_block):
        yield start, min(start + rows_per_block, num_rows)

"""Part of a full parameter that a rank holds: its offset, and its elements without padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fused_megatron.sharding.box import Box, TensorBox


@dataclass(frozen=True)
class ParameterShard:
    """Box of the full parameter that a rank holds.

    Attributes:
        full_shape: shape of the parameter over all ranks, without rows that pad a vocabulary.
        offset: start of this rank's part in each dim. If it lies beyond the end, the whole part is padding.
        replicated: every tensor-parallel rank holds the full parameter.
        copy: index of this rank's copy, if several ranks, but not all, hold the same box (fewer key-value heads than
            ranks). When each element must count once (norms, parameter counts), count copy 0 only.
    """

    full_shape: tuple[int, ...]
    offset: tuple[int, ...]
    replicated: bool = False
    copy: int = 0

    def real_shape(self, local_shape: Sequence[int]) -> tuple[int, ...]:
        """Return local_shape without padding: the shape of the leading part that exists in the full parameter."""
        return tuple(
            max(0, min(size, full - start))
            for size, full, start in zip(local_shape, self.full_shape, self.offset, strict=True)
        )

    def block(self, local_shape: Sequence[int]) -> Box:
        """Return the block of the full parameter that a local tensor holds; empty if the tensor is only padding."""
        starts = tuple(min(start, full) for start, full in zip(self.offset, self.full_shape, strict=True))
        return Box(starts, self.real_shape(local_shape))


@dataclass(frozen=True)
class ShardPart:
    """Rows of a local parameter that stacks shards of several full ones (gate and up; query, key and value).

    Attributes:
        name: name of the full parameter; "" if the local parameter is a shard of a single one.
        rows: range of the part in dim 0 of the local parameter.
        shard: the part of the full parameter that these rows hold.
    """

    name: str
    rows: slice
    shard: ParameterShard

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows of this part, as a view, from a tensor in the shape of the local parameter."""
        return tensor if self.rows == slice(None) else tensor[self.rows]

    def is_full(self, local_shape: Sequence[int]) -> bool:
        """Whether a local parameter with this shape holds the full parameter of this part."""
        shape = (len(range(local_shape[0])[self.rows]), *local_shape[1:]) if self.name else local_shape
        return self.shard.real_shape(shape) == self.shard.full_shape

    def held(self, tensor: torch.Tensor) -> TensorBox:
        """Return the elements of this part without padding, from a tensor in the shape of the local parameter."""
        rows = self.of(tensor)
        block = self.shard.block(rows.shape)
        return TensorBox(rows[block.slices(block.offset)], self.shard.full_shape, block.offset)

    def full_name(self, parameter_name: str) -> str:
        """Return the name of the full parameter, given the name of the local parameter."""
        return f"{parameter_name}.{self.name}" if self.name else parameter_name

"""The part of a full parameter that a rank holds: where it lies, and which elements of it are real."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fused_megatron.sharding.box import Box, TensorBox


@dataclass(frozen=True)
class ParameterShard:
    """The box of the full parameter that a rank holds.

    Attributes:
        full_shape: of the parameter over all ranks; the true one, without rows that pad a vocabulary.
        offset: where this rank's part begins in each dim. It may lie beyond the end: then all of it is padding.
        replicated: every tensor-parallel rank holds the whole parameter.
        copy: which of several copies of this box the rank holds, where some ranks, not all, hold the same (key-value
            heads that are fewer than ranks); whoever counts every number once counts copy 0.
    """

    full_shape: tuple[int, ...]
    offset: tuple[int, ...]
    replicated: bool = False
    copy: int = 0

    def real_shape(self, local_shape: Sequence[int]) -> tuple[int, ...]:
        """The leading part of a local tensor that exists in the full parameter: local_shape without padding."""
        return tuple(
            max(0, min(size, full - start))
            for size, full, start in zip(local_shape, self.full_shape, self.offset, strict=True)
        )

    def block(self, local_shape: Sequence[int]) -> Box:
        """The block of the full parameter that a local tensor holds, without padding; empty where all is padding."""
        starts = tuple(min(start, full) for start, full in zip(self.offset, self.full_shape, strict=True))
        return Box(starts, self.real_shape(local_shape))


@dataclass(frozen=True)
class ShardPart:
    """Some rows of a local parameter that stacks shards of several full ones (gate and up; query, key and value).

    Attributes:
        name: of the full parameter; "" where the local one is a shard of one alone.
        rows: where the part lies in dim 0 of the local parameter.
        shard: which part of the full parameter these rows are.
    """

    name: str
    rows: slice
    shard: ParameterShard

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part's rows of a tensor in the shape of the local parameter, a view."""
        return tensor[self.rows] if self.name else tensor

    def is_full(self, local_shape: Sequence[int]) -> bool:
        """Whether a local parameter of this shape holds all of the part's full parameter."""
        shape = (len(range(local_shape[0])[self.rows]), *local_shape[1:]) if self.name else local_shape
        return self.shard.real_shape(shape) == self.shard.full_shape

    def held(self, tensor: torch.Tensor) -> TensorBox:
        """The part's real elements of a tensor in the shape of the local parameter, as their box of the full one."""
        rows = self.of(tensor)
        block = self.shard.block(rows.shape)
        return TensorBox(rows[block.slices(block.offset)], self.shard.full_shape, block.offset)

    def full_name(self, parameter_name: str) -> str:
        """The name of the full parameter, given that of the local one."""
        return f"{parameter_name}.{self.name}" if self.name else parameter_name

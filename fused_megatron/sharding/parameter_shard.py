"""Which part of a full parameter a rank holds."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError, check


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

    def box(self, local_shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(start, stop) in each dim of the full parameter, without padding; start == stop for padding alone."""
        starts = tuple(min(start, full) for start, full in zip(self.offset, self.full_shape, strict=True))
        real = self.real_shape(local_shape)
        return tuple((start, start + size) for start, size in zip(starts, real, strict=True))


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

    def full_name(self, parameter_name: str) -> str:
        """The name of the full parameter, given that of the local one."""
        return f"{parameter_name}.{self.name}" if self.name else parameter_name


def mark_shard(parameter: torch.Tensor, shard: ParameterShard | tuple[ShardPart, ...]) -> None:
    """Say which part of the full parameter, or of which full parameters, this is."""
    for one in (shard,) if isinstance(shard, ParameterShard) else [part.shard for part in shard]:
        dims = (len(one.full_shape), len(one.offset))
        check(
            dims == (parameter.dim(), parameter.dim()),
            f"shard={one} must have the {parameter.dim()} dims of the parameter {tuple(parameter.shape)}",
        )
    parameter._fused_megatron_shard = shard  # type: ignore[attr-defined]


def parameter_parts(parameter: torch.Tensor) -> tuple[ShardPart, ...]:
    """The shards that a parameter is made of, one below the other; for most it is one, without a name."""
    shape = tuple(parameter.shape)
    replicated = ParameterShard(full_shape=shape, offset=(0,) * len(shape), replicated=True)
    shard = getattr(parameter, "_fused_megatron_shard", replicated)
    return (ShardPart("", slice(None), shard),) if isinstance(shard, ParameterShard) else shard


def parameter_shard(parameter: torch.Tensor) -> ParameterShard:
    """Which part of the full parameter this is; one that was never marked is replicated.

    Raises:
        InputError: the parameter stacks shards of several full ones (parameter_parts tells them).
    """
    parts = parameter_parts(parameter)
    check(not parts[0].name, f"the parameter stacks {[part.name for part in parts]}: see parameter_parts")
    return parts[0].shard


class ShardedModule(nn.Module):
    """A module whose own parameters are shards, and stay marked so when torch makes new ones of them.

    torch drops a parameter's attributes in deepcopy, to_empty() and some moves between devices.
    """

    tp_group: Any

    def __init__(self) -> None:
        super().__init__()
        self._shards: dict[str, ParameterShard | tuple[ShardPart, ...]] = {}

    def register_shard(self, name: str, parameter: nn.Parameter, shard: ParameterShard | tuple[ShardPart, ...]) -> None:
        """Register a parameter and mark it."""
        self.register_parameter(name, parameter)
        self._shards[name] = shard
        self._mark()

    def _mark(self) -> None:
        for name, shard in self._shards.items():
            mark_shard(self.get_parameter(name), shard)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._mark()
        return self

    def __getstate__(self) -> Any:
        raise InputError(
            f"a {type(self).__name__} cannot be pickled, since it belongs to a group of running processes "
            "(save model.state_dict(), this rank's shards, or fused_megatron.full_state_dict(model))"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self.tp_group)] = self.tp_group  # a process group cannot be copied; both use the same
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        twin._mark()
        return twin

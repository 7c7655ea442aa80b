"""The record on a parameter: its shard, its main gradient, its store of deferred weight gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fused_megatron.checks import check
from fused_megatron.sharding.parameter_shard import ParameterShard, ShardPart

Shard = ParameterShard | tuple[ShardPart, ...]
"""Which part of the full parameter a parameter is, or of which full parameters, one below the other."""

_ATTRIBUTE = "_fused_megatron_record"


class DeferredWeightGradients:
    """Products that backward leaves for later, so that a pipeline sends the gradient of its input first.

    A parameter that has one in its record hands over its products while `collecting` is entered; outside, everything
    is as without. No graph is cut, so recomputation, tied weights and main_grad work as ever. A weight that is not the
    parameter itself (cast by autocast, made by a function) has an empty record and is never put off.
    """

    def __init__(self) -> None:
        self._into: list[Callable[[], None]] | None = None

    @contextmanager
    def collecting(self, products: list[Callable[[], None]]) -> Iterator[None]:
        """Append the products of backward passes in this context to a list; the caller runs them, in order."""
        assert self._into is None, "one backward at a time"
        self._into = products
        try:
            yield
        finally:
            self._into = None

    @property
    def open(self) -> bool:
        """Whether a backward now leaves its products."""
        return self._into is not None

    def append(self, product: Callable[[], None]) -> None:
        """One product; only while open."""
        assert self._into is not None
        self._into.append(product)


@dataclass(frozen=True)
class ParameterRecord:
    """What this package knows of a parameter besides its values.

    Attributes:
        shard: which part of the full parameter it is; None for one that was never marked.
        main_grad: a tensor of its shape, float32 as a rule, that layers of this package add its gradient to, in place
            of `grad`.
        deferred: takes the products of its gradient that backward puts off.
    """

    shard: Shard | None = None
    main_grad: torch.Tensor | None = None
    deferred: DeferredWeightGradients | None = None


_EMPTY = ParameterRecord()


def parameter_record(parameter: torch.Tensor) -> ParameterRecord:
    """The record of a parameter, empty where nothing was recorded.

    torch drops it in deepcopy, to_empty(), fully_shard(), swap_tensors() and some moves between devices; which shard
    a parameter is, its module knows, and marks again (sharded_module.py).
    """
    record: ParameterRecord = getattr(parameter, _ATTRIBUTE, _EMPTY)
    return record


def update_record(parameter: torch.Tensor, **changes: Any) -> None:
    """Change attributes of a parameter's record."""
    setattr(parameter, _ATTRIBUTE, replace(parameter_record(parameter), **changes))


def mark_shard(parameter: torch.Tensor, shard: Shard) -> None:
    """Say which part of the full parameter, or of which full parameters, this is."""
    for one in (shard,) if isinstance(shard, ParameterShard) else [part.shard for part in shard]:
        dims = (len(one.full_shape), len(one.offset))
        check(
            dims == (parameter.dim(), parameter.dim()),
            f"shard={one} must have the {parameter.dim()} dims of the parameter {tuple(parameter.shape)}",
        )
    update_record(parameter, shard=shard)


def parameter_parts(parameter: torch.Tensor) -> tuple[ShardPart, ...]:
    """The shards that a parameter is made of, one below the other; for most it is one, without a name."""
    shard = parameter_record(parameter).shard
    if shard is None:  # whole on every rank
        shape = tuple(parameter.shape)
        shard = ParameterShard(full_shape=shape, offset=(0,) * len(shape), replicated=True)
    return (ShardPart("", slice(None), shard),) if isinstance(shard, ParameterShard) else shard


def parameter_shard(parameter: torch.Tensor) -> ParameterShard:
    """Which part of the full parameter this is; one that was never marked is replicated.

    Raises:
        InputError: the parameter stacks shards of several full ones (parameter_parts tells them).
    """
    parts = parameter_parts(parameter)
    check(not parts[0].name, f"the parameter stacks {[part.name for part in parts]}: see parameter_parts")
    return parts[0].shard

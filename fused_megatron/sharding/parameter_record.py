"""Record on a parameter: its shard, its experts' ranks, its main gradient, and its deferred weight gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fused_megatron.checks import check
from fused_megatron.collectives import Group, group_rank, group_size
from fused_megatron.sharding.parameter_shard import ParameterShard, ShardPart

Shard = ParameterShard | tuple[ShardPart, ...]
"""The part of the full parameter that a parameter holds, or the stacked parts of several full parameters."""

_ATTRIBUTE = "_fused_megatron_record"


class DeferredWeightGradients:
    """Store of the weight-gradient products that a backward defers, so that a pipeline sends its input gradient first.

    Backward appends to the store in a parameter's record while `collecting` is entered, and only then. No graph is cut,
    so recomputation, tied weights and main_grad work as usual. A weight that is not the parameter itself (cast by
    autocast, made by a function) has an empty record, and its gradient is never deferred.
    """

    def __init__(self) -> None:
        self._into: list[Callable[[], None]] | None = None

    @contextmanager
    def collecting(self, products: list[Callable[[], None]]) -> Iterator[None]:
        """Append the products of backward passes in this context to a list; the caller runs them in order."""
        assert self._into is None, "one backward at a time"
        self._into = products
        try:
            yield
        finally:
            self._into = None

    @property
    def open(self) -> bool:
        """Whether a backward now defers its products."""
        return self._into is not None

    def append(self, product: Callable[[], None]) -> None:
        """Defer one product; only while open."""
        assert self._into is not None
        self._into.append(product)


@dataclass(frozen=True)
class ExpertRanks:
    """Ranks that hold the other parts of the experts of a layer.

    Attributes:
        ep_group: ranks that hold the other experts; None for this rank only. Each rank holds equally many experts, in
            the order of the ranks.
        etp_group: ranks that hold the other shards of the same experts; None for this rank only.
    """

    ep_group: Group = None
    etp_group: Group = None

    @property
    def ep_size(self) -> int:
        """Number of ranks that share the experts."""
        return group_size(self.ep_group)

    @property
    def ep_rank(self) -> int:
        """Index of this rank among the ranks that share the experts."""
        return group_rank(self.ep_group)


@dataclass(frozen=True)
class ParameterRecord:
    """Facts about a parameter that the package keeps besides the values.

    Attributes:
        shard: the part of the full parameter; None for a parameter that was never marked.
        experts: ranks that hold the other parts of a parameter of experts; None for a dense parameter, whose other
            parts are on the tensor-parallel ranks.
        stored_shape: shape of the full tensor in the user's model, if it differs from the shape of the stacked parts:
            experts [E, rows, columns] where the parts are stacked to [E rows, columns].
        main_grad: returns the tensor to which the layers of this package add the gradient, instead of `grad`: in the
            parameter's shape, as a rule float32. A backward calls it when it has a gradient to add, so that the tensor
            need not exist before.
        summed_grad: the gradient after the sum over data-parallel ranks, of the rows that this rank owns. None: the sum
            is in `grad`.
        deferred: the store for products of the gradient that backward defers.
        sum_later: called in forward by a layer that makes only this rank's part of the gradient (partial_gradients.py),
            with the ranks over whose parts the gradient must be summed before the optimizer reads it. None: the layer
            sums in backward.
    """

    shard: Shard | None = None
    experts: ExpertRanks | None = None
    stored_shape: tuple[int, ...] | None = None
    main_grad: Callable[[], torch.Tensor] | None = None
    summed_grad: torch.Tensor | None = None
    deferred: DeferredWeightGradients | None = None
    sum_later: Callable[[Group], None] | None = None


_EMPTY = ParameterRecord()


def parameter_record(parameter: torch.Tensor) -> ParameterRecord:
    """Return the record of a parameter; an empty one if nothing was recorded.

    torch drops the record in deepcopy, to_empty(), fully_shard(), swap_tensors() and some moves between devices. The
    module knows the shard of each parameter, and records it again (sharded_module.py).
    """
    record: ParameterRecord = getattr(parameter, _ATTRIBUTE, _EMPTY)
    return record


def update_record(parameter: torch.Tensor, **changes: Any) -> None:
    """Change attributes of a parameter's record."""
    setattr(parameter, _ATTRIBUTE, replace(parameter_record(parameter), **changes))


def mark_shard(
    parameter: torch.Tensor,
    shard: Shard,
    experts: ExpertRanks | None = None,
    stored_shape: tuple[int, ...] | None = None,
) -> None:
    """Record the part of the full parameter, or the stacked parts of several, that this parameter holds.

    Args:
        parameter: the local tensor.
        shard: the part, or the stacked parts.
        experts: for a parameter of experts, the ranks that hold its other parts.
        stored_shape: as in ParameterRecord.

    Raises:
        InputError: the shard has another number of dims.
    """
    for one in (shard,) if isinstance(shard, ParameterShard) else [part.shard for part in shard]:
        dims = (len(one.full_shape), len(one.offset))
        check(
            dims == (parameter.dim(), parameter.dim()),
            f"shard={one} must have the {parameter.dim()} dims of the parameter {tuple(parameter.shape)}",
        )
    update_record(parameter, shard=shard, experts=experts, stored_shape=stored_shape)


def parameter_parts(parameter: torch.Tensor) -> tuple[ShardPart, ...]:
    """Return the stacked shards of a parameter. Most parameters have one part, whose name is empty."""
    shard = parameter_record(parameter).shard
    if shard is None:  # whole on every rank
        shape = tuple(parameter.shape)
        shard = ParameterShard(full_shape=shape, offset=(0,) * len(shape), replicated=True)
    return (ShardPart("", slice(None), shard),) if isinstance(shard, ParameterShard) else shard


def parameter_shard(parameter: torch.Tensor) -> ParameterShard:
    """Return the part of the full parameter that this is; a parameter that was never marked is replicated.

    Raises:
        InputError: the parameter stacks shards of several full parameters (use parameter_parts).
    """
    parts = parameter_parts(parameter)
    check(not parts[0].name, f"the parameter stacks {[part.name for part in parts]}: see parameter_parts")
    return parts[0].shard

"""Lookup of the rows that data-parallel ranks share of a model (data_parallel.shard_data_parallel)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch
from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.sharding.replica_sets import Replicas

_ATTRIBUTE = "_fused_megatron_replica_shards"


class ReplicaShards(Protocol):
    """Weights and gradients of a model of which each data-parallel rank owns some rows.

    Attributes:
        replicas: the ranks that share each parameter, and the rows of it that this rank owns.
    """

    replicas: Replicas

    def gradients(self) -> Mapping[nn.Parameter, torch.Tensor]:
        """Return the gradients of this rank's rows, of the parameters that the step used. Every rank calls it."""

    def whole(self) -> AbstractContextManager[None]:
        """Make all parameters whole while the context is open. Every rank must enter it."""

    def take_over(self) -> None:
        """Take values that were written into whole parameters, inside whole()."""


def attach_replica_shards(model: nn.Module, shards: ReplicaShards) -> None:
    """Record on a model that data-parallel ranks share its rows."""
    model.__dict__[_ATTRIBUTE] = shards


def replica_shards(model: nn.Module) -> ReplicaShards | None:
    """Return what data-parallel ranks share of a model or of a module inside it; None if they share nothing.

    Raises:
        InputError: several modules inside were sharded one by one.
    """
    found = [module.__dict__[_ATTRIBUTE] for module in model.modules() if _ATTRIBUTE in module.__dict__]
    if len(found) > 1:
        raise InputError(
            f"{type(model).__name__} has {len(found)} parts that were sharded apart (call it for each part)"
        )
    return found[0] if found else None


@contextmanager
def whole_weights(model: nn.Module, *, changes: bool = False) -> Iterator[None]:
    """Make the parameters of a model whole while the context is open, if data-parallel ranks share them.

    Args:
        model: any model. Every data-parallel rank must enter the context.
        changes: whether the context writes parameters.
    """
    shards = replica_shards(model)
    if shards is None:
        yield
        return
    with shards.whole():
        yield
        if changes:
            shards.take_over()


@contextmanager
def whole_models(models: Iterable[nn.Module]) -> Iterator[None]:
    """Make the weights of models whole while the context is open, for code that overwrites them. All ranks enter."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(whole_weights(model, changes=True))
        yield

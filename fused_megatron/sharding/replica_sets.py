"""Replicas of the parameters of a model: ranks that hold the same part, for dense parameters and for experts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from fused_megatron.collectives import Group, group_size
from fused_megatron.sharding.parameter_record import parameter_record
from fused_megatron.sharding.row_shards import WHOLE_ROWS, ModelRows, RowShards

Parameter = TypeVar("Parameter", bound=torch.Tensor)


@dataclass(frozen=True)
class ReplicaSet:
    """The ranks that hold the same part of some parameters, and the rows of this part that each of them owns.

    Attributes:
        rows: the rows of each parameter that this rank owns.
        shard_group: ranks that own the other rows; None if this rank owns all rows.
        copy_group: ranks that own the same rows; None for this rank only.
        group: all replicas: shard_group times copy_group; None for one rank.
    """

    rows: RowShards = WHOLE_ROWS
    shard_group: Group = None
    copy_group: Group = None
    group: Group = None

    @classmethod
    def of_copies(cls, group: Group) -> "ReplicaSet":
        """Return the set of replicas that each own all rows."""
        return cls(copy_group=group, group=group)

    @property
    def num_copies(self) -> int:
        """Number of ranks that own the same rows."""
        return group_size(self.copy_group)


@dataclass(frozen=True)
class Replicas:
    """Replicas of a model.

    Dense parameters are replicated over data- and context-parallel ranks. Experts are folded over data-, context- and
    tensor-parallel ranks, and so have replicas of their own: every rank that holds the same experts.

    Attributes:
        dense: replicas of dense parameters.
        experts: replicas of the parameters of experts; equal to `dense` where the same ranks hold both.
    """

    dense: ReplicaSet = ReplicaSet()
    experts: ReplicaSet = ReplicaSet()

    @classmethod
    def of_copies(cls, group: Group) -> "Replicas":
        """Return the replicas of a model whose parameters are all whole on every rank of a group."""
        both = ReplicaSet.of_copies(group)
        return cls(both, both)

    @property
    def rows(self) -> ModelRows:
        """The rows of each parameter that this rank owns."""
        return ModelRows(self.dense.rows, self.experts.rows)

    @property
    def sets(self) -> tuple[ReplicaSet, ...]:
        """The different sets: dense parameters first, then experts if they have other replicas."""
        return (self.dense,) if self.dense == self.experts else (self.dense, self.experts)

    def of(self, parameter: torch.Tensor) -> ReplicaSet:
        """Return the replicas of a parameter."""
        return self.dense if parameter_record(parameter).experts is None else self.experts

    def split(self, parameters: Mapping[str, Parameter]) -> Iterator[tuple[ReplicaSet, Mapping[str, Parameter]]]:
        """Yield each set with its parameters, in the order of `sets`. A set without parameters is left out.

        All ranks of a set hold parameters of the same names in the model, and so go through the same sets.
        """
        for each in self.sets:
            members = {name: p for name, p in parameters.items() if self.of(p) == each}
            if members:
                yield each, members

"""This rank's rows of a sequence that every rank has whole, and the whole sequence from the rows of all ranks."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.collectives import Group, group_rank
from fused_megatron.collectives.groups import on_ranks
from fused_megatron.context_parallel.gathered_keys import gather_rows
from fused_megatron.ops.autograd_function import AutogradFunction
from fused_megatron.sharding import SequencePartition


def own_rows(x: torch.Tensor, dim: int, partition: SequencePartition, group: Group) -> torch.Tensor:
    """Return this rank's rows of a replicated tensor.

    forward   y  [.., rows, ..] = rows of x at the rank's positions     replicated -> own rows
    backward  dx [.., S, ..]    = rows of all ranks, by position        own rows -> replicated

    Args:
        x: [.., S, ..] any dtype, the same on every rank.
        dim: dim of the sequence.
        partition: the positions of each rank.
        group: the ranks.

    Returns:
        [.., rows, ..], contiguous.

    Communication: none in forward. Backward: one all-gather, to which each rank sends its rows, padded to the most rows
        of a rank.
    Memory: nothing saved.
    """
    result: torch.Tensor = on_ranks(_OwnRows, group)(x, dim, partition, group)
    return result


def all_rows(x: torch.Tensor, dim: int, partition: SequencePartition, group: Group) -> torch.Tensor:
    """Return the whole sequence, for computations that are the same on every rank.

    forward   y  [.., S, ..]    = rows of all ranks, by position        own rows -> replicated
    backward  dx [.., rows, ..] = rows of dy at the rank's positions    replicated -> own rows

    Args:
        x: [.., rows, ..] any dtype.
        dim, partition, group: as in own_rows.

    Returns:
        [.., S, ..], contiguous.

    Communication: forward as own_rows in backward; none in backward.
    Memory: nothing saved.
    """
    result: torch.Tensor = on_ranks(_AllRows, group)(x, dim, partition, group)
    return result


class _OwnRows(AutogradFunction):
    op = "interop.own_rows"

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, partition: SequencePartition, group: Group) -> torch.Tensor:
        ctx.rows = dim, partition, group
        return _taken(x, dim, partition, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return _gathered(dy, *ctx.rows), None, None, None


class _AllRows(AutogradFunction):
    op = "interop.all_rows"

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, partition: SequencePartition, group: Group) -> torch.Tensor:
        ctx.rows = dim, partition, group
        return _gathered(x, *ctx.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return _taken(dy, *ctx.rows), None, None, None


def _taken(x: torch.Tensor, dim: int, partition: SequencePartition, group: Group) -> torch.Tensor:
    return partition.layouts[group_rank(group)].take(x, dim).clone(memory_format=torch.contiguous_format)


def _gathered(x: torch.Tensor, dim: int, partition: SequencePartition, group: Group) -> torch.Tensor:
    (in_order,) = gather_rows((x.movedim(dim, 0),), partition.sizes, partition.order, group)
    return in_order.movedim(0, dim).contiguous()

"""Collectives without autograd that can run under other work: start one, do the work, then take the result.

All of them leave the caller's tensor as it is, except start_all_reduce_, whose name says so. Which may run beside what
is the matter of streams.
"""

from collections.abc import Callable
from math import prod

import torch
import torch.distributed as dist

from fused_megatron.checks import check_divisible
from fused_megatron.collectives.groups import group_size
from fused_megatron.collectives.transport.shared_memory import add_in_order
from fused_megatron.collectives.transport.transfer import Transfer, start

_Result = Callable[[torch.Tensor], torch.Tensor]


def start_all_reduce_(x: torch.Tensor, group: dist.ProcessGroup | None) -> Transfer:
    """Sum x over the ranks, in place where it is contiguous: for a tensor that the caller owns."""
    x = x.contiguous()
    if group_size(group) == 1:
        return Transfer(None, (x,))
    return start(dist.all_reduce, group, x)


def start_all_gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> Transfer:
    """[.., n, ..] of each rank to their concatenation [.., R n, ..] along dim."""
    ranks = group_size(group)
    if ranks == 1:
        return Transfer(None, (x,))
    dim = dim % x.dim()
    full_shape = (*x.shape[:dim], ranks * x.shape[dim], *x.shape[dim + 1 :])
    shape = (ranks, *x.shape)

    def result(gathered: torch.Tensor) -> torch.Tensor:
        # Without dims before it, the gathered blocks already lie one after the other along dim, and this is a view.
        return gathered.view(shape).movedim(0, dim).reshape(full_shape)

    source = x.contiguous()
    return start(dist.all_gather_single, group, x.new_empty(prod(shape)), source.view(-1), result=result)


def start_all_gather_blocks(shard: torch.Tensor, blocks: torch.Tensor, group: dist.ProcessGroup | None) -> Transfer:
    """shard [n, ..] of each rank, one after the other, into blocks [R n, ..]; both contiguous."""
    if group_size(group) == 1:
        return Transfer(None, (shard,))
    return start(dist.all_gather_single, group, blocks.view(-1), shard.view(-1), result=lambda _: blocks)


def start_reduce_scatter(x: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> Transfer:
    """Sum x over the ranks and keep this rank's block [.., n / R, ..] of dim."""
    ranks = group_size(group)
    if ranks == 1:
        return Transfer(None, (x,))
    dim = dim % x.dim()
    check_divisible(f"shape[{dim}]", x.shape[dim], "group size", ranks)
    shard_shape = (*x.shape[:dim], x.shape[dim] // ranks, *x.shape[dim + 1 :])
    source = x.contiguous()
    if prod(x.shape[:dim]) != 1:  # bring the blocks one after the other
        source = source.unflatten(dim, (ranks, shard_shape[dim])).movedim(dim, 0).contiguous()
    return start_reduce_scatter_blocks(source, x.new_empty(shard_shape), group)


def start_reduce_scatter_blocks(blocks: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup | None) -> Transfer:
    """Sum blocks [R n, ..] over the ranks and keep this rank's in shard [n, ..]; both contiguous."""
    assert group is not None
    if blocks.is_cpu and group._get_backend(blocks.device).name() == "gloo":
        return _start_exchange_and_sum(blocks, shard, group)
    return start(dist.reduce_scatter_single, group, shard.view(-1), blocks.view(-1), result=lambda _: shard)


def _start_exchange_and_sum(blocks: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup) -> Transfer:
    """Every rank sends each other its block and adds up what it receives, in the order of the ranks.

    gloo's own reduce-scatter is an all-reduce of which a part is kept: twice the bytes. This sends no more than a
    reduce-scatter must, and no sum depends on where in the message an element stands.
    """

    def add_up(received: torch.Tensor) -> torch.Tensor:
        add_in_order(shard.view(-1), list(received.view(group.size(), -1)))
        return shard

    source = blocks.view(-1)
    source.stands_for = "reduce_scatter"  # type: ignore[attr-defined]  # for observe.record_communication
    return start(dist.all_to_all_single, group, torch.empty_like(source), source, result=add_up)


def own_block(x: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """This rank's block [.., n / R, ..] of dim, a view; no communication."""
    ranks = group_size(group)
    if ranks == 1:
        return x
    assert group is not None
    check_divisible(f"shape[{dim}]", x.shape[dim], "group size", ranks)
    block = x.shape[dim] // ranks
    return x.narrow(dim, group.rank() * block, block)

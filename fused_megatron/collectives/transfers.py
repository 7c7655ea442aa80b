"""Collectives without autograd that can run under other work: start one, do the work, then take the result.

All of them leave the caller's tensor as it is, except start_all_reduce_, whose name says so.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.distributed as dist

from fused_megatron.checks import check_divisible
from fused_megatron.collectives.groups import group_size


class Transfer:
    """A collective under way. On a GPU the wait is one of the stream, not of the host."""

    def __init__(
        self,
        work: dist.Work | None,
        buffers: Sequence[torch.Tensor],
        result: Callable[[torch.Tensor], torch.Tensor] = lambda buffer: buffer,
    ) -> None:
        self._work = work
        self._buffers = buffers  # the source stays alive until the collective has read it; the result is the last one
        self._result = result

    def wait(self) -> torch.Tensor:
        """The result; call once."""
        if self._work is not None:
            self._work.wait()
        buffer = self._buffers[-1]
        self._work, self._buffers = None, ()
        return self._result(buffer)


def start_all_reduce_(x: torch.Tensor, group: dist.ProcessGroup | None) -> Transfer:
    """Sum x over the ranks, in place where it is contiguous: for a tensor that the caller owns."""
    x = x.contiguous()
    if group_size(group) == 1:
        return Transfer(None, [x])
    return Transfer(dist.all_reduce(x, group=group, async_op=True), [x])


def start_all_gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> Transfer:
    """[.., n, ..] of each rank to their concatenation [.., R n, ..] along dim."""
    ranks = group_size(group)
    if ranks == 1:
        return Transfer(None, [x])
    dim = dim % x.dim()
    source = x.contiguous()
    full_shape = (*x.shape[:dim], ranks * x.shape[dim], *x.shape[dim + 1 :])
    gathered = x.new_empty((ranks, *x.shape))
    work = dist.all_gather_single(gathered.view(-1), source.view(-1), group=group, async_op=True)
    # Without dims before it, the gathered blocks already lie one after the other along dim, and this is a view.
    return Transfer(work, [source, gathered], lambda buffer: buffer.movedim(0, dim).reshape(full_shape))


def start_all_gather_blocks(shard: torch.Tensor, blocks: torch.Tensor, group: dist.ProcessGroup | None) -> Transfer:
    """shard [n, ..] of each rank, one after the other, into blocks [R n, ..]; both contiguous."""
    if group_size(group) == 1:
        return Transfer(None, [shard])
    work = dist.all_gather_single(blocks.view(-1), shard.view(-1), group=group, async_op=True)
    return Transfer(work, [shard, blocks])


def start_reduce_scatter(x: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> Transfer:
    """Sum x over the ranks and keep this rank's block [.., n / R, ..] of dim."""
    ranks = group_size(group)
    if ranks == 1:
        return Transfer(None, [x])
    dim = dim % x.dim()
    check_divisible(f"shape[{dim}]", x.shape[dim], "group size", ranks)
    shard_shape = (*x.shape[:dim], x.shape[dim] // ranks, *x.shape[dim + 1 :])
    source = x.contiguous()
    if prod(x.shape[:dim]) != 1:  # bring the blocks one after the other
        source = source.unflatten(dim, (ranks, shard_shape[dim])).movedim(dim, 0).contiguous()
    shard = x.new_empty(shard_shape)
    work = dist.reduce_scatter_single(shard.view(-1), source.view(-1), group=group, async_op=True)
    return Transfer(work, [source, shard])


def start_reduce_scatter_blocks(blocks: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup | None) -> Transfer:
    """Sum blocks [R n, ..] over the ranks and keep this rank's in shard [n, ..]; both contiguous."""
    work = dist.reduce_scatter_single(shard.view(-1), blocks.view(-1), group=group, async_op=True)
    return Transfer(work, [blocks, shard])


def own_block(x: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """This rank's block [.., n / R, ..] of dim, a view; no communication."""
    ranks = group_size(group)
    if ranks == 1:
        return x
    assert group is not None
    check_divisible(f"shape[{dim}]", x.shape[dim], "group size", ranks)
    block = x.shape[dim] // ranks
    return x.narrow(dim, group.rank() * block, block)

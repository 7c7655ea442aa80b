"""Collectives without autograd that can run under other work: start one, do the work, then take the result.

All of them leave the caller's tensor as it is, except start_all_reduce_, whose name says so.

Two queues run side by side: the current stream with the products, and the group's communication stream, which is the
backend's own (NCCL: of high priority in the groups that init_mesh makes; gloo: its threads; none among ranks of one
host with CPU tensors, where host_ring copies at start and sums at wait). Three rules say when a collective may read,
when others may, and who owns the memory:

    start    the collective goes behind all that the current stream holds by now, so that it reads what was computed
             before it; whatever the current stream is given next runs beside it
    wait     all that the current stream is given next goes behind the collective; on a GPU the host does not stop
    memory   in between the Transfer holds every buffer that the collective reads or writes. They were allocated on the
             current stream and are given back to it behind the collective, so that no record_stream is needed and no
             memory stays in use for longer

c10d keeps the first two when a collective is issued with async_op=True: NCCL's stream waits for an event of the current
stream at start, the current stream for an event of NCCL's at wait. Streams and events of our own would say the same
once more, one level higher. Neither rule stops the host or reads a value, so that both can be captured in a CUDA graph;
a captured step waits for every transfer that it starts, as capture demands.

Overlapped products use nothing else. testing.RecordedStreams plays both queues and names every two accesses to the same
memory that no rule orders.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.distributed as dist

from fused_megatron.checks import check_divisible
from fused_megatron.collectives.groups import group_size
from fused_megatron.collectives.transport.host_ring import add_in_order
from fused_megatron.collectives.transport.select import Work, start
from fused_megatron.observe.waits import COMMUNICATION, wait_for


class Transfer:
    """A collective under way, or several that fill one result.

    Args:
        works: what has to be waited for; nothing where the result is there already.
        buffers: what the works read and write, the one with the result first.
        result: of the first buffer, once it is filled.
    """

    def __init__(
        self,
        works: Sequence[Work],
        buffers: tuple[torch.Tensor, ...],
        result: Callable[[torch.Tensor], torch.Tensor] = lambda buffer: buffer,
    ) -> None:
        self._works, self._buffers, self._result = works, buffers, result

    def wait(self) -> torch.Tensor:
        """The result; call once, on the stream that started it. On a GPU the stream waits, not the host."""
        for work in self._works:
            if isinstance(work, Transfer):
                work.wait()
            else:
                wait_for(COMMUNICATION, work.wait)
        buffer = self._buffers[0]
        self._works, self._buffers = (), ()
        return self._result(buffer)


def start_all_reduce_(x: torch.Tensor, group: dist.ProcessGroup | None) -> Transfer:
    """Sum x over the ranks, in place where it is contiguous: for a tensor that the caller owns."""
    x = x.contiguous()
    if group_size(group) == 1:
        return Transfer((), (x,))
    return Transfer(start(dist.all_reduce, group, x), (x,))


def start_all_gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> Transfer:
    """[.., n, ..] of each rank to their concatenation [.., R n, ..] along dim."""
    ranks = group_size(group)
    if ranks == 1:
        return Transfer((), (x,))
    dim = dim % x.dim()
    full_shape = (*x.shape[:dim], ranks * x.shape[dim], *x.shape[dim + 1 :])
    shape = (ranks, *x.shape)

    def result(gathered: torch.Tensor) -> torch.Tensor:
        # Without dims before it, the gathered blocks already lie one after the other along dim, and this is a view.
        return gathered.view(shape).movedim(0, dim).reshape(full_shape)

    buffers = x.new_empty(prod(shape)), x.contiguous().view(-1)
    return Transfer(start(dist.all_gather_single, group, *buffers), buffers, result)


def start_all_gather_blocks(shard: torch.Tensor, blocks: torch.Tensor, group: dist.ProcessGroup | None) -> Transfer:
    """shard [n, ..] of each rank, one after the other, into blocks [R n, ..]; both contiguous."""
    if group_size(group) == 1:
        return Transfer((), (shard,))
    works = start(dist.all_gather_single, group, blocks.view(-1), shard.view(-1))
    return Transfer(works, (blocks, shard))


def start_reduce_scatter(x: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> Transfer:
    """Sum x over the ranks and keep this rank's block [.., n / R, ..] of dim."""
    ranks = group_size(group)
    if ranks == 1:
        return Transfer((), (x,))
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
    # A fake group on CPU tensors does what gloo would.
    if blocks.is_cpu and group._get_backend(blocks.device).name() in ("gloo", "fake"):
        return _start_exchange_and_sum(blocks, shard, group)
    return Transfer(start(dist.reduce_scatter_single, group, shard.view(-1), blocks.view(-1)), (shard, blocks))


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
    buffers = torch.empty_like(source), source
    return Transfer(start(dist.all_to_all_single, group, *buffers), buffers, add_up)


def own_block(x: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """This rank's block [.., n / R, ..] of dim, a view; no communication."""
    ranks = group_size(group)
    if ranks == 1:
        return x
    assert group is not None
    check_divisible(f"shape[{dim}]", x.shape[dim], "group size", ranks)
    block = x.shape[dim] // ranks
    return x.narrow(dim, group.rank() * block, block)

"""Collectives without autograd that run under other work: start one, do the work, then wait for the result.

No function changes the caller's tensor, except start_all_reduce_, whose name says so.

Two queues run side by side: the current stream with the products, and the communication stream of the group. The
latter belongs to the backend (NCCL: a stream, of high priority in the groups that init_mesh makes; gloo: its threads).
CPU tensors of ranks on one host need none: host_ring copies at start and sums at wait. Three rules order the accesses:

    start    the collective runs after all work that the current stream holds, and so reads what was computed before;
             later work of the current stream runs beside it
    wait     later work of the current stream runs after the collective; on a GPU the host does not stop
    memory   between start and wait the Transfer holds every buffer that the collective reads or writes. The buffers
             were allocated on the current stream and return to it after the collective, so that they need no
             record_stream, and no memory stays in use for longer

c10d keeps the first two rules for a collective with async_op=True: NCCL's stream waits for an event of the current
stream at start, and the current stream for an event of NCCL's stream at wait. So this module needs no streams or events
of its own. No rule stops the host or reads a value, so a CUDA graph can capture both; a captured step must wait for
every transfer that it starts.

Overlapped products use only these functions. testing.RecordedStreams simulates both queues and reports every two
accesses to the same memory that no rule orders.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.distributed as dist

from fused_megatron.checks import check_divisible
from fused_megatron.collectives.groups import group_size
from fused_megatron.collectives.transport.host_ring import add_in_order
from fused_megatron.collectives.transport.select import Work, is_shared, meet, start
from fused_megatron.observe.waits import COMMUNICATION, wait_for


class Transfer:
    """A collective under way, or several that fill one result.

    Args:
        works: parts of the collective to wait for; empty if the result is there already.
        buffers: tensors that the works read and write; the first holds the result.
        result: makes the result of the filled first buffer.
    """

    def __init__(
        self,
        works: Sequence[Work],
        buffers: tuple[torch.Tensor, ...],
        result: Callable[[torch.Tensor], torch.Tensor] = lambda buffer: buffer,
    ) -> None:
        self._works, self._buffers, self._result = works, buffers, result

    def wait(self) -> torch.Tensor:
        """Wait, and return the result. Call once, on the stream that started it; on a GPU only the stream waits."""
        for work in self._works:
            if isinstance(work, Transfer):
                work.wait()
            else:
                wait_for(COMMUNICATION, work.wait)
        buffer = self._buffers[0]
        self._works, self._buffers = (), ()
        return self._result(buffer)


def start_all_reduce_(x: torch.Tensor, group: dist.ProcessGroup | None) -> Transfer:
    """Start to sum x over the ranks, in place if x is contiguous; for a tensor that the caller owns."""
    x = x.contiguous()
    if group_size(group) == 1:
        return Transfer((), (x,))
    return Transfer(start(dist.all_reduce, group, x), (x,))


def start_all_gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> Transfer:
    """Start to concatenate x [.., n, ..] of all ranks along dim, to [.., R n, ..]."""
    ranks = group_size(group)
    if ranks == 1:
        return Transfer((), (x,))
    dim = dim % x.dim()
    full_shape = (*x.shape[:dim], ranks * x.shape[dim], *x.shape[dim + 1 :])
    shape = (ranks, *x.shape)

    def result(gathered: torch.Tensor) -> torch.Tensor:
        # If dim is the first, the gathered blocks are already in order along it, and this is a view.
        return gathered.view(shape).movedim(0, dim).reshape(full_shape)

    buffers = x.new_empty(prod(shape)), x.contiguous().view(-1)
    return Transfer(start(dist.all_gather_single, group, *buffers), buffers, result)


def start_all_gather_blocks(shard: torch.Tensor, blocks: torch.Tensor, group: dist.ProcessGroup | None) -> Transfer:
    """Start to gather shard [n, ..] of all ranks, in rank order, into blocks [R n, ..]; both contiguous."""
    if group_size(group) == 1:
        return Transfer((), (shard,))
    works = start(dist.all_gather_single, group, blocks.view(-1), shard.view(-1))
    return Transfer(works, (blocks, shard))


def start_reduce_scatter(x: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> Transfer:
    """Start to sum x over the ranks, and keep this rank's block [.., n / R, ..] of dim.

    Raises:
        InputError: R does not divide n.
    """
    ranks = group_size(group)
    if ranks == 1:
        return Transfer((), (x,))
    dim = dim % x.dim()
    check_divisible(f"shape[{dim}]", x.shape[dim], "group size", ranks)
    shard_shape = (*x.shape[:dim], x.shape[dim] // ranks, *x.shape[dim + 1 :])
    source = x.contiguous()
    if prod(x.shape[:dim]) != 1:  # make each block contiguous
        source = source.unflatten(dim, (ranks, shard_shape[dim])).movedim(dim, 0).contiguous()
    return start_reduce_scatter_blocks(source, x.new_empty(shard_shape), group)


def start_reduce_scatter_blocks(blocks: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup | None) -> Transfer:
    """Start to sum blocks [R n, ..] over the ranks, and keep this rank's block in shard [n, ..]; both contiguous."""
    assert group is not None
    # A fake group of CPU tensors does what gloo would.
    if blocks.is_cpu and group._get_backend(blocks.device).name() in ("gloo", "fake"):
        meet(group)
        if not is_shared(group, blocks):
            return _start_exchange_and_sum(blocks, shard, group)
    return Transfer(start(dist.reduce_scatter_single, group, shard.view(-1), blocks.view(-1)), (shard, blocks))


def _start_exchange_and_sum(blocks: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup) -> Transfer:
    """Start a reduce-scatter by an all-to-all: each rank receives its block from all ranks and sums in rank order.

    gloo's own reduce-scatter is an all-reduce whose result is cut, with twice the bytes. This one sends no more than a
    reduce-scatter must, and the order of a sum does not depend on the index of the element.
    """

    def add_up(received: torch.Tensor) -> torch.Tensor:
        add_in_order(shard.view(-1), list(received.view(group.size(), -1)))
        return shard

    source = blocks.view(-1)
    source.stands_for = "reduce_scatter"  # type: ignore[attr-defined]  # for observe.record_communication
    buffers = torch.empty_like(source), source
    return Transfer(start(dist.all_to_all_single, group, *buffers), buffers, add_up)


def own_block(x: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return this rank's block [.., n / R, ..] of dim, a view; no communication."""
    ranks = group_size(group)
    if ranks == 1:
        return x
    assert group is not None
    check_divisible(f"shape[{dim}]", x.shape[dim], "group size", ranks)
    block = x.shape[dim] // ranks
    return x.narrow(dim, group.rank() * block, block)

"""The order between products and collectives: when a collective may read, when others may, and who owns the memory.

Two queues run side by side: the current stream with the products, and the group's communication stream, which is the
backend's own (NCCL: of high priority in the groups that init_mesh makes; gloo: its threads; none among ranks of one
host with CPU tensors, where shared_memory copies at start and sums at wait). Three rules order them:

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

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fused_megatron.collectives.transport.shared_memory import SharedWork, start_shared
from fused_megatron.observe.waits import COMMUNICATION, wait_for


class Transfer:
    """A collective under way. On a GPU the wait is one of the stream, not of the host."""

    def __init__(
        self,
        work: dist.Work | SharedWork | None,
        buffers: tuple[torch.Tensor, ...],
        result: Callable[[torch.Tensor], torch.Tensor] = lambda buffer: buffer,
    ) -> None:
        self._work = work
        self._buffers = buffers
        self._result = result

    def wait(self) -> torch.Tensor:
        """What `result` makes of the first buffer; call once, on the stream that started it."""
        if self._work is not None:
            wait_for(COMMUNICATION, self._work.wait)
        buffer = self._buffers[0]
        self._work, self._buffers = None, ()
        return self._result(buffer)


def start(
    collective: Callable[..., dist.Work | None],
    group: dist.ProcessGroup | None,
    *buffers: torch.Tensor,
    result: Callable[[torch.Tensor], torch.Tensor] = lambda buffer: buffer,
    **options: Any,
) -> Transfer:
    """collective(*buffers) of torch.distributed, beside what the current stream is given until the transfer's wait().

    Args:
        collective: one with async_op.
        group: its ranks.
        buffers: what it reads and writes, the one with its result first.
        result: of the first buffer, once it is there.
        **options: further arguments of the collective.
    """
    shared = None if options else start_shared(collective, group, *buffers)
    work = shared or collective(*buffers, group=group, async_op=True, **options)
    return Transfer(work, buffers, result)

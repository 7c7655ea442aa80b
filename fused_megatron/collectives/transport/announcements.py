"""Announcements of transfers that torch.distributed does not dispatch, to tools that watch its ops.

A dispatch mode (observe.record_communication, torch's CommDebugMode) sees the collectives of torch.distributed as ops.
What goes through shared memory, or over a pipeline's own channels, calls an op that does nothing instead: an overload
of the one that torch.distributed would dispatch, with the global ranks that take part.
"""

from collections.abc import Sequence

import torch

_LIBRARY = torch.library.Library("c10d", "FRAGMENT")
for _schema in (
    "allreduce_.shared_memory(Tensor[] tensors, int[] ranks) -> ()",
    "_allgather_base_.shared_memory(Tensor output, Tensor input, int[] ranks) -> ()",
    "alltoall_base_.shared_memory(Tensor output, Tensor input, int[] ranks) -> ()",
    "send.pipeline(Tensor[] tensors, int[] ranks) -> ()",
    "recv_.pipeline(Tensor[] tensors, int[] ranks) -> ()",
    "_allgather_base_.pipeline(Tensor output, Tensor input, int[] ranks) -> ()",
):
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_schema.partition("(")[0], lambda *_: None, "CompositeExplicitAutograd")

ALL_REDUCE = torch.ops.c10d.allreduce_.shared_memory
ALL_GATHER = torch.ops.c10d._allgather_base_.shared_memory
ALL_TO_ALL = torch.ops.c10d.alltoall_base_.shared_memory


def announce_send(tensor: torch.Tensor, source: int, target: int) -> None:
    """A message that this rank, the source, begins to send."""
    torch.ops.c10d.send.pipeline([tensor], [source, target])


def announce_receive(buffer: torch.Tensor, source: int, target: int) -> None:
    """A message that this rank, the target, begins to receive."""
    torch.ops.c10d.recv_.pipeline([buffer], [source, target])


def announce_all_gather(shard: torch.Tensor, ranks: Sequence[int]) -> None:
    """An all-gather of a shard of each of these ranks."""
    whole = shard.detach().expand(len(ranks), *shard.shape)  # only its shape is looked at
    torch.ops.c10d._allgather_base_.pipeline(whole, shard, list(ranks))

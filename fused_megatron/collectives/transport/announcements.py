"""Announcements of transfers that torch.distributed does not dispatch, to tools that watch its ops.

A dispatch mode (observe.record_communication, torch's CommDebugMode) sees the collectives of torch.distributed as ops.
A transfer through shared memory, or over the channels of a pipeline, calls an op that does nothing instead: an overload
of the op that torch.distributed would dispatch, with the global ranks of the transfer.
"""

from collections.abc import Sequence

import torch

_LIBRARY = torch.library.Library("c10d", "FRAGMENT")
for _schema in (
    "allreduce_.shared_memory(Tensor[] tensors, int[] ranks) -> ()",
    "_allgather_base_.shared_memory(Tensor output, Tensor input, int[] ranks) -> ()",
    "alltoall_base_.shared_memory(Tensor output, Tensor input, int[] ranks) -> ()",
    "_reduce_scatter_base_.shared_memory(Tensor output, Tensor input, int[] ranks) -> ()",
    "send.pipeline(Tensor[] tensors, int[] ranks) -> ()",
    "recv_.pipeline(Tensor[] tensors, int[] ranks) -> ()",
    "_allgather_base_.pipeline(Tensor output, Tensor input, int[] ranks) -> ()",
):
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_schema.partition("(")[0], lambda *_: None, "CompositeExplicitAutograd")

ALL_REDUCE = torch.ops.c10d.allreduce_.shared_memory
ALL_GATHER = torch.ops.c10d._allgather_base_.shared_memory
ALL_TO_ALL = torch.ops.c10d.alltoall_base_.shared_memory
REDUCE_SCATTER = torch.ops.c10d._reduce_scatter_base_.shared_memory


def announce_send(tensor: torch.Tensor, source: int, target: int) -> None:
    """Announce that this rank, the source, starts to send a message."""
    torch.ops.c10d.send.pipeline([tensor], [source, target])


def announce_receive(buffer: torch.Tensor, source: int, target: int) -> None:
    """Announce that this rank, the target, starts to receive a message."""
    torch.ops.c10d.recv_.pipeline([buffer], [source, target])


def announce_all_gather(shard: torch.Tensor, ranks: Sequence[int]) -> None:
    """Announce an all-gather over these ranks, each of which has a shard like this one."""
    full = shard.detach().expand(len(ranks), *shard.shape)  # tools read its shape only
    torch.ops.c10d._allgather_base_.pipeline(full, shard, list(ranks))

"""Messages between some ranks of a group, of any sizes, that run under other work: one to a rank, or one to each.

The messages of a group leave and arrive in the order in which its ranks start them.
"""

from collections.abc import Sequence
from math import prod
from weakref import WeakSet

import torch
import torch.distributed as dist

from fused_megatron.collectives.groups import group_rank, group_size, is_fake
from fused_megatron.collectives.together import sum_over_ranks_
from fused_megatron.collectives.transfers import Transfer
from fused_megatron.collectives.transport.select import Work, gather_sizes, start, start_exchange

_connected: WeakSet[dist.ProcessGroup] = WeakSet()


def connect_for_messages(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Connect all ranks of a group, before a message that only some of them take part in.

    NCCL connects a group's ranks in the first operation and needs all of them there. All ranks call this at the same
    point; a second call does nothing.

    Communication: on a GPU one all-reduce of 4 bytes, the first time.
    """
    if group is not None and device.type == "cuda" and group not in _connected:
        sum_over_ranks_(torch.zeros(1, device=device), group)
        _connected.add(group)


def start_message(
    outgoing: tuple[int, torch.Tensor] | None,
    incoming: tuple[int, torch.Tensor] | None,
    group: dist.ProcessGroup | None,
) -> Transfer:
    """Start to send a tensor to a rank, and to receive one from a rank; the result is the received tensor.

    The receiver gives a buffer of the size that the sender sends. Messages of two ranks arrive in the order in which
    both start them. Call connect_for_messages() before the first one.

    Args:
        outgoing: (rank in the group, contiguous tensor); None or an empty tensor: send nothing.
        incoming: (rank in the group, contiguous buffer); None or an empty buffer: receive nothing.
        group: the ranks.
    """
    nothing = (0, torch.empty(0))
    messages, buffers = [], []
    for operation, (peer, buffer) in ((dist.irecv, incoming or nothing), (dist.isend, outgoing or nothing)):
        buffers.append(buffer)
        if buffer.numel():
            messages.append(dist.P2POp(operation, buffer, group=group, group_peer=peer))
    if is_fake(group):  # a batch asks for the backend of meta tensors, which a fake group does not have
        for message in messages:
            of_peer = {"group_src" if message.op is dist.irecv else "group_dst": message.group_peer}
            message.op(message.tensor, group=group, **of_peer)
        return Transfer((), tuple(buffers))
    works: Sequence[Work] = dist.batch_isend_irecv(messages) if messages else ()
    return Transfer(works, tuple(buffers))


def start_row_exchange(
    rows: torch.Tensor,
    sizes: Sequence[Sequence[int]],
    group: dist.ProcessGroup | None,
    into: torch.Tensor | None = None,
) -> Transfer:
    """Start an all-to-all of any numbers of rows; the result is the received rows, by the rank that sent them.

    Args:
        rows: [rows that this rank sends, ..], contiguous; first those for rank 0, then those for rank 1, ..
        sizes: sizes[i][j] is the number of rows that rank i sends to rank j; the same on every rank.
        group: the ranks; None for this rank only.
        into: memory for the received rows; None: allocated.

    Communication: one all-to-all of `rows`.
    """
    if group is None:
        return Transfer((), (rows,))
    received = sum(of_rank[group.rank()] for of_rank in sizes)
    result = rows.new_empty(received, *rows.shape[1:]) if into is None else into
    return Transfer(start_exchange(result, rows, sizes, group), (result, rows))


def exchange_blocks(
    outgoing: Sequence[Sequence[torch.Tensor]],
    shapes: Sequence[Sequence[Sequence[int]]],
    members: Sequence[int],
    group: dist.ProcessGroup | None,
) -> list[list[torch.Tensor]]:
    """Send tensors to every member, and return those that every member sends to this rank: one all-to-all.

    Args:
        outgoing: for each member the tensors for it, of one dtype and device, any shapes and strides.
        shapes: for each member the shapes of the tensors that it sends to this rank.
        members: ranks of the group, this rank among them. The other ranks of the group exchange at the same time, among
            themselves.
        group: the ranks; None for this rank only.

    Returns:
        For each member its tensors: contiguous views of one buffer.

    Communication: one all-to-all of the elements of `outgoing`, those for this rank among them.
    """
    if len(members) == 1:
        return [list(each) for each in outgoing]
    source = torch.cat([x.reshape(-1) for tensors in outgoing for x in tensors])
    received = [sum(map(prod, each)) for each in shapes]
    sent = [sum(x.numel() for x in tensors) for tensors in outgoing]
    result = source.new_empty(sum(received))
    _start_all_to_all(result, source, members, received, sent, group).wait()
    found = []
    for part, each in zip(result.split(received), shapes, strict=True):
        pieces = part.split([prod(shape) for shape in each])
        found.append([piece.view(tuple(shape)) for piece, shape in zip(pieces, each, strict=True)])
    return found


def _start_all_to_all(
    result: torch.Tensor,
    source: torch.Tensor,
    members: Sequence[int],
    received: Sequence[int],
    sent: Sequence[int],
    group: dist.ProcessGroup | None,
) -> Transfer:
    ranks = group_size(group)
    # The transport of equal blocks is chosen on all ranks or on none: sent[i] of rank j is received[j] of rank i.
    if len(members) == ranks and len({*received, *sent}) == 1:
        return Transfer(start(dist.all_to_all_single, group, result, source), (result, source))
    assert group is not None and group_rank(group) in members
    into, out_of = [0] * ranks, [0] * ranks
    for member, size_in, size_out in zip(members, received, sent, strict=True):
        into[member], out_of[member] = size_in, size_out
    sizes = gather_sizes(out_of, group, source)
    if sizes is not None:
        return Transfer(start_exchange(result, source, sizes, group), (result, source))
    work = dist.all_to_all_single(result, source, into, out_of, group=group, async_op=True)
    return Transfer(() if work is None else (work,), (result, source))

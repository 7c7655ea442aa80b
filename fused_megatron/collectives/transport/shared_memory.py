"""Collectives of CPU tensors among ranks of one host, in place of gloo's: through memory and not through TCP.

gloo sends through the loopback: every byte is copied by the kernel and by threads, on the cores of the products. Here a
rank copies what it sends into its ring (host_ring), once, when the transfer starts; and sums, or copies, straight from
the rings of all ranks when it waits. In between nothing runs: what is computed there hides that others come later.

Sums are in the order of the ranks, the same bits on all of them; of 16-bit types in float32, rounded once.

It is found out at the first collective of a group, and all its ranks agree: gloo, Linux, one host, memory that can be
mapped. FUSED_MEGATRON_SHARED_MEMORY=off, on any rank, leaves the group to gloo.
"""

import logging
import os
from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from fused_megatron.collectives.transport.host_ring import RING_BYTES, HostRing, Piece, meet

_LOG = logging.getLogger(__name__)
# Several pieces fit the ring, so that none waits for the one before it to be taken.
_PIECE_BYTES = RING_BYTES // 4
_SWITCH = "FUSED_MEGATRON_SHARED_MEMORY"
_rings: WeakKeyDictionary[dist.ProcessGroup, HostRing | None] = WeakKeyDictionary()

# Ops that do nothing: overloads of those that torch.distributed would dispatch, by which tools that watch these (a
# dispatch mode: observe.record_communication, torch's CommDebugMode) see the transfers that it is not asked for.
_ANNOUNCEMENTS = torch.library.Library("c10d", "FRAGMENT")
for _schema in (
    "allreduce_.shared_memory(Tensor[] tensors, int[] ranks) -> ()",
    "_allgather_base_.shared_memory(Tensor output, Tensor input, int[] ranks) -> ()",
    "alltoall_base_.shared_memory(Tensor output, Tensor input, int[] ranks) -> ()",
):
    _ANNOUNCEMENTS.define(_schema)
    _ANNOUNCEMENTS.impl(_schema.partition("(")[0], lambda *_: None, "CompositeExplicitAutograd")


class SharedWork:
    """A collective under way, as torch.distributed's Work."""

    def __init__(self, ring: HostRing, pieces: list[Piece]) -> None:
        self._ring, self._pieces = ring, pieces

    def wait(self) -> None:
        """Fill the destination; call once."""
        for piece in self._pieces:
            self._ring.finish(piece)


def start_shared(
    collective: Callable[..., object], group: dist.ProcessGroup | None, *buffers: torch.Tensor
) -> SharedWork | None:
    """collective(*buffers) of torch.distributed with its default options, or None where that has to do it.

    Args:
        collective: of those in _FORMS; another one (a test's, in its place) is None.
        group: its ranks.
        buffers: contiguous, the destination first.
    """
    form = _FORMS.get(collective)
    destination, source = buffers[0], buffers[-1]
    if form is None or group is None or type(source) is not torch.Tensor or not source.is_cpu:
        return None
    ring = _ring(group)
    if ring is None:
        return None
    announcement, pieces = form
    announcement(*(buffers if len(buffers) > 1 else (list(buffers),)), ring.global_ranks)
    return SharedWork(ring, pieces(ring, destination, source))


def is_shared(group: dist.ProcessGroup | None, like: torch.Tensor) -> bool:
    """Whether collectives of such tensors go through shared memory.

    All ranks ask at once, before the first collective of the group or with it: they meet here.
    """
    return group is not None and like.is_cpu and _ring(group) is not None


def add_in_order(total: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """total = sum of the parts, first to last; of 16-bit types in float32, rounded once."""
    if total.dtype in (torch.bfloat16, torch.float16):
        wide = parts[0].float()
        for part in parts[1:]:
            wide += part
        total.copy_(wide)
        return
    torch.add(parts[0], parts[1], out=total)
    for part in parts[2:]:
        total += part


def _ring(group: dist.ProcessGroup) -> HostRing | None:
    if group not in _rings:
        _rings[group] = _new_ring(group)
    return _rings[group]


def _new_ring(group: dist.ProcessGroup) -> HostRing | None:
    try:
        backend = group._get_backend(torch.device("cpu"))
        global_ranks = dist.get_process_group_ranks(group)
    except (RuntimeError, KeyError, ValueError):
        return None  # no backend for CPU tensors, or a group that torch.distributed does not know
    # The same on every rank; whatever may differ is for meet() to agree upon.
    if backend.name() != "gloo" or group.size() == 1 or not hasattr(os, "memfd_create"):
        return None
    timeout = getattr(getattr(backend, "options", None), "_timeout", dist.default_pg_timeout)
    ring = meet(group, global_ranks, timeout.total_seconds(), wanted=os.environ.get(_SWITCH) != "off")
    where = "over gloo" if ring is None else "through shared memory"
    _LOG.info("%d ranks of one group: collectives %s", group.size(), where)
    return ring


def _all_reduce(ring: HostRing, destination: torch.Tensor, source: torch.Tensor) -> list[Piece]:
    flat = source.view(-1)
    return [ring.write([part], partial(add_in_order, part)) for part in flat.split(_elements(flat)) if part.numel()]


def _all_gather(ring: HostRing, destination: torch.Tensor, source: torch.Tensor) -> list[Piece]:
    flat = source.view(-1)
    size = _elements(flat)
    parts = zip(flat.split(size), destination.view(ring.num_ranks, -1).split(size, dim=1), strict=True)
    return [ring.write([part], partial(_copy_rows, columns)) for part, columns in parts if part.numel()]


def _all_to_all(ring: HostRing, destination: torch.Tensor, source: torch.Tensor) -> list[Piece]:
    received, sent = (x.view(ring.num_ranks, -1) for x in (destination, source))
    size = max(1, _elements(sent) // ring.num_ranks)

    def take(columns: torch.Tensor, slots: list[torch.Tensor]) -> None:
        _copy_rows(columns, [slot.view(ring.num_ranks, -1)[ring.rank] for slot in slots])

    parts = zip(sent.split(size, dim=1), received.split(size, dim=1), strict=True)
    return [ring.write(list(part), partial(take, columns)) for part, columns in parts if part.numel()]


def _copy_rows(to: torch.Tensor, rows: list[torch.Tensor]) -> None:
    for own, row in zip(to, rows, strict=True):
        own.copy_(row)


def _elements(x: torch.Tensor) -> int:
    return max(1, _PIECE_BYTES // x.element_size())


# The collective -> what announces it, and what starts it.
_FORMS = {
    dist.all_reduce: (torch.ops.c10d.allreduce_.shared_memory, _all_reduce),
    dist.all_gather_single: (torch.ops.c10d._allgather_base_.shared_memory, _all_gather),
    dist.all_to_all_single: (torch.ops.c10d.alltoall_base_.shared_memory, _all_to_all),
}

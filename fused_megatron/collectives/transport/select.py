"""Choice of the transport of a collective: memory that the ranks of one host share, or the backend of the group.

CPU tensors of a gloo group whose ranks are on one host (Linux) go through memory that all of these ranks map
(host_ring). All other tensors go through torch.distributed. The ranks of a group agree once, in meet() or with their
first collective, on whether gloo is the backend, the host is one, and the memory can be mapped.
FUSED_MEGATRON_SHARED_MEMORY=off, on any rank, leaves the group to gloo.
"""

import itertools
import logging
import os
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from fused_megatron.collectives.groups import Group
from fused_megatron.collectives.transport import announcements, host_ring
from fused_megatron.collectives.transport.host_ring import HostRing
from fused_megatron.collectives.transport.shared_memory import map_rings

_LOG = logging.getLogger(__name__)
_SWITCH = "FUSED_MEGATRON_SHARED_MEMORY"
_rings: WeakKeyDictionary[dist.ProcessGroup, HostRing | None] = WeakKeyDictionary()

# Collective -> its kind, the op that announces it, and the function that cuts it into pieces that fit in a ring.
_SHARED: dict[Callable[..., Any], tuple[str, Any, Callable[..., host_ring.Parts]]] = {
    dist.all_reduce: ("all_reduce", announcements.ALL_REDUCE, host_ring.cut_all_reduce),
    dist.all_gather_single: ("all_gather", announcements.ALL_GATHER, host_ring.cut_all_gather),
    dist.all_to_all_single: ("all_to_all", announcements.ALL_TO_ALL, host_ring.cut_all_to_all),
    dist.reduce_scatter_single: ("reduce_scatter", announcements.REDUCE_SCATTER, host_ring.cut_reduce_scatter),
}


class Work(Protocol):
    """A part of a collective under way, like torch.distributed.Work."""

    def wait(self) -> Any:
        """Wait until this part is done; on a GPU the current stream waits, not the host."""


def start(collective: Callable[..., Any], group: Group, *buffers: torch.Tensor) -> Sequence[Work]:
    """Start collective(*buffers) of torch.distributed with its default options; the caller waits for every Work.

    Args:
        collective: a function of torch.distributed with async_op. A function that a test or a tool put in its place is
            called: only the original goes through shared memory.
        group: the ranks.
        buffers: contiguous tensors that the collective reads and writes, the destination first. The caller keeps them
            until the wait.

    Raises:
        RuntimeError: only through shared memory, here or at the wait: another thread or a forked process uses the
            group; ranks disagree on kind, dtype or bytes.
    """
    shared, source = _SHARED.get(collective), buffers[-1]
    ring = None if shared is None else _ring_for(group, source)
    if shared is None or ring is None:
        work = collective(*buffers, group=group, async_op=True)
        return () if work is None else (work,)
    kind, announce, cut = shared
    ring.begin(kind, source)
    _announce(announce, ring, *(buffers if len(buffers) > 1 else (list(buffers),)))
    return list(itertools.starmap(ring.write, cut(ring, buffers[0], source)))


def start_exchange(
    destination: torch.Tensor, source: torch.Tensor, sizes: Sequence[Sequence[int]], group: dist.ProcessGroup
) -> Sequence[Work]:
    """Start an all-to-all of blocks of any numbers of rows; the caller waits for every Work.

    Args:
        destination: [rows that this rank receives, ..], contiguous; the blocks of all ranks, in rank order.
        source: [rows that this rank sends, ..], contiguous; the blocks for all ranks, in rank order.
        sizes: sizes[i][j] is the number of rows that rank i sends to rank j; the same on every rank.
        group: the ranks.

    Raises:
        RuntimeError: as start; ranks disagree on the sum of all sizes.
    """
    collective, rank = dist.all_to_all_single, group.rank()
    ring = _ring_for(group, source) if collective in _SHARED else None
    if ring is None:
        received = [of_rank[rank] for of_rank in sizes]
        work = collective(destination, source, received, list(sizes[rank]), group=group, async_op=True)
        return () if work is None else (work,)
    ring.begin("exchange", source, sum(map(sum, sizes)) * prod(source.shape[1:]))
    _announce(announcements.ALL_TO_ALL, ring, destination, source)
    return list(itertools.starmap(ring.write, host_ring.cut_exchange(ring, destination, source, sizes)))


def gather_sizes(sizes: Sequence[int], group: Group, like: torch.Tensor) -> list[list[int]] | None:
    """Return the numbers of all ranks, for start_exchange of tensors like this; None if no shared memory carries them.

    Tools do not see this: the numbers only serve the transport.
    """
    ring = _ring_for(group, like) if dist.all_to_all_single in _SHARED else None
    if ring is None:
        return None
    own = torch.tensor(sizes)
    every = own.new_empty(ring.num_ranks, len(sizes))
    ring.begin("all_gather", own)
    for work in itertools.starmap(ring.write, host_ring.cut_all_gather(ring, every, own)):
        work.wait()
    found: list[list[int]] = every.tolist()
    return found


def _ring_for(group: Group, source: torch.Tensor) -> HostRing | None:
    """Return the ring that carries a tensor of a group; None if the backend of the group does."""
    if group is None or type(source) is not torch.Tensor or not source.is_cpu:
        return None
    meet(group)
    return _rings[group]


def _announce(announce: Any, ring: HostRing, *buffers: Any) -> None:
    if torch._C._len_torch_dispatch_stack():  # nobody else hears an announcement
        announce(*buffers, ring.global_ranks)


def meet(group: Group) -> None:
    """Agree with the other ranks of a group on whether shared memory carries its CPU tensors.

    Otherwise the first collective of the group does so. A layer calls this when it is made, so that no forward or
    backward has to. All ranks of the group call it at the same point; a second call does nothing.

    Communication: two all-gathers of a few bytes a rank, the first time.
    """
    if group is not None and group not in _rings:
        _rings[group] = _new_ring(group)


def is_shared(group: Group, like: torch.Tensor) -> bool:
    """Whether collectives of tensors like this go through shared memory; False before the ranks met.

    Communication: none.
    """
    return group is not None and like.is_cpu and _rings.get(group) is not None


def _new_ring(group: dist.ProcessGroup) -> HostRing | None:
    try:
        backend = group._get_backend(torch.device("cpu"))
        global_ranks = dist.get_process_group_ranks(group)
    except (RuntimeError, KeyError, ValueError):
        return None  # no backend for CPU tensors, or a group that torch.distributed does not know
    # This condition is the same on every rank. map_rings agrees on conditions that may differ.
    if backend.name() != "gloo" or group.size() == 1 or not hasattr(os, "memfd_create"):
        return None
    timeout = getattr(getattr(backend, "options", None), "_timeout", dist.default_pg_timeout)
    ring = map_rings(group, global_ranks, timeout.total_seconds(), wanted=os.environ.get(_SWITCH) != "off")
    where = "over gloo" if ring is None else "through shared memory"
    _LOG.info("%d ranks of one group: collectives %s", group.size(), where)
    return ring

"""Memory that the ranks of one host map from each other, and how they agree on it: set up once a group.

Every rank makes memory without a name, of which nothing can stay behind, and hands its descriptor to the others over
Unix sockets; these stay open, for the messages of the rings.
"""

import contextlib
import mmap
import os
import socket
import tempfile
from typing import Any

import torch
import torch.distributed as dist

from fused_megatron.collectives.transport import host_ring
from fused_megatron.collectives.transport.host_ring import HostRing

_MOST_RANKS = 64
_CONNECT_S = 20.0
_MOST_TEXT_BYTES = 512  # a host's name, and a path, of which a socket takes 108


def map_rings(group: dist.ProcessGroup, global_ranks: list[int], timeout_s: float, wanted: bool) -> HostRing | None:
    """The ring of a group, or None on all of its ranks where one does not want it or cannot map all others.

    Communication: two all-gathers of a few bytes a rank.
    """
    rank, size = group.rank(), group.size()
    ring: HostRing | None = None
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        path = ""
        try:
            # Only this user may look in there; it may be gone before this rank is done.
            folder = tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True)
            path = os.path.join(stack.enter_context(folder), "s")
            listener.bind(path)
            listener.listen(size)
        except OSError:  # no folder for temporary files, a path too long, a file system without sockets
            wanted = False
        place = f"{socket.gethostname()}\n{path}" if wanted and size <= _MOST_RANKS else ""
        places = [line.split("\n") for line in _tell(group, place)]
        if len({host for host, *_ in places}) == 1 and place:
            try:
                ring = HostRing(rank, global_ranks, *_connect(rank, [p for _, p in places], listener), timeout_s)
            except OSError:  # another container of this host, a limit, a rank that gave up
                ring = None
        agreed = all(_tell(group, "mapped" if ring else ""))
    return ring if agreed else None


def _tell(group: dist.ProcessGroup, text: str) -> list[str]:
    """Every rank's text. By the backend itself: tools watch torch.distributed's function, and in a store the keys of a
    group that is no more may still lie."""
    own = torch.zeros(_MOST_TEXT_BYTES, dtype=torch.uint8)
    encoded = text.encode()[:_MOST_TEXT_BYTES]
    own[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    every = [torch.empty_like(own) for _ in range(group.size())]
    backend: Any = group._get_backend(own.device)
    backend.allgather([every], [own]).wait()
    return [bytes(some.tolist()).rstrip(b"\0").decode(errors="replace") for some in every]


def _connect(
    rank: int, paths: list[str], listener: socket.socket
) -> tuple[list[torch.Tensor], dict[int, socket.socket]]:
    """(rings, sockets): every rank calls those before it, and both send a descriptor of their memory, which has no name
    that could stay behind.
    """
    own = os.memfd_create("fused_megatron")
    os.ftruncate(own, host_ring.RING_BYTES)
    listener.settimeout(_CONNECT_S)
    sockets: dict[int, socket.socket] = {}
    rings: list[torch.Tensor] = [torch.empty(0)] * len(paths)
    try:
        rings[rank] = _map(own)
        for i in range(len(paths) - 1):
            if i < rank:
                s = socket.socket(socket.AF_UNIX)
                s.settimeout(_CONNECT_S)
                s.connect(paths[i])
            else:
                s = listener.accept()[0]
                s.settimeout(_CONNECT_S)
            socket.send_fds(s, [bytes([rank])], [own])
            message, descriptors, _, _ = socket.recv_fds(s, 1, 1)
            if len(message) != 1 or len(descriptors) != 1:
                raise OSError("a rank gave up")
            sockets[message[0]] = s
            try:
                rings[message[0]] = _map(descriptors[0])
            finally:
                os.close(descriptors[0])
    finally:
        os.close(own)
    return rings, sockets


def _map(descriptor: int) -> torch.Tensor:
    with torch.inference_mode(False):  # its tensors could not be written outside of it
        return torch.frombuffer(mmap.mmap(descriptor, host_ring.RING_BYTES), dtype=torch.uint8)

"""Setup of memory that the ranks of one host map from each other, once for each group.

Every rank makes anonymous memory, which ends with its processes, and sends its descriptor to the other ranks over Unix
sockets. The sockets stay open for the messages of the rings.
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
_MOST_TEXT_BYTES = 512  # the name of a host, and a path of a socket (at most 108 bytes)


def map_rings(group: dist.ProcessGroup, global_ranks: list[int], timeout_s: float, wanted: bool) -> HostRing | None:
    """Return the ring of a group; None on all ranks if some rank does not want it or cannot map another's memory.

    Communication: two all-gathers of a few bytes a rank.
    """
    rank, size = group.rank(), group.size()
    ring: HostRing | None = None
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        path = ""
        try:
            # Only this user may read this folder. Another process may delete it before this rank is done.
            folder = tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True)
            path = os.path.join(stack.enter_context(folder), "s")
            listener.bind(path)
            listener.listen(size)
        except OSError:  # no folder for temporary files, a path too long, a file system without sockets
            wanted = False
        address = f"{socket.gethostname()}\n{path}" if wanted and size <= _MOST_RANKS else ""
        addresses = [text.split("\n") for text in _gather_texts(group, address)]
        if len({host for host, *_ in addresses}) == 1 and address:
            try:
                ring = HostRing(rank, global_ranks, *_connect(rank, [p for _, p in addresses], listener), timeout_s)
            except OSError:  # another container of this host, a limit, a rank that gave up
                ring = None
        agreed = all(_gather_texts(group, "mapped" if ring else ""))
    return ring if agreed else None


def _gather_texts(group: dist.ProcessGroup, text: str) -> list[str]:
    """Gather a text from every rank, through the backend itself.

    torch.distributed's function is watched by tools, and a store may still hold the keys of an earlier group.
    """
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
    """Connect to every other rank, and exchange descriptors of memory; return (rings, sockets).

    Each rank connects to the listeners of the ranks before it.
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
    with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
        return torch.frombuffer(mmap.mmap(descriptor, host_ring.RING_BYTES), dtype=torch.uint8)

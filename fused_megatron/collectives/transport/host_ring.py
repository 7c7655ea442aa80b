"""Memory that the ranks of one host map from each other: a ring for each rank, written by it, read by all.

    write   a piece goes to a place of this rank's ring, and a message of 16 bytes to every other rank says so
    take    for a piece that every rank has written: read their places, which are the same as this rank's, since all
            ranks write pieces of the same sizes in the same order

A place is written again when every rank has taken what was there. The messages go through Unix sockets: the kernel
orders them behind the writes to memory that come before, and they break when a rank ends.
"""

import mmap
import os
import select
import socket
import struct
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

RING_BYTES = 16 << 20
MOST_RANKS = 64
_ALIGNMENT = 64  # of places: a cache line
_CONNECT_S = 20.0
# About what it costs to sleep and be woken; for longer, the core belongs to whoever else has work.
_SPIN_S = 50e-6
_MOST_TEXT_BYTES = 512  # a host's name, and a path, of which a socket takes 108
_MESSAGE = struct.Struct("<qq")  # pieces written so far, and pieces taken


@dataclass
class Piece:
    """What one message is about."""

    number: int
    begin: int  # of its place, counted on from the first round of the ring
    take: Callable[[list[torch.Tensor]], None]
    slots: list[torch.Tensor]
    taken: bool = False


class HostRing:
    """This rank's ring, those of the others, and the sockets that join them; for one thread.

    Args:
        rank: this one's place in the group.
        global_ranks: of the group, by their place.
        rings: [RING_BYTES] uint8, of every rank.
        sockets: to every other rank, by its place.
        timeout_s: how long to wait for another rank.
    """

    def __init__(
        self, rank: int, global_ranks: list[int], rings: Sequence[torch.Tensor], sockets: dict[int, socket.socket],
        timeout_s: float,
    ) -> None:  # fmt: skip
        self.rank, self.global_ranks, self.num_ranks = rank, global_ranks, len(rings)
        self._rings, self._sockets, self._timeout_s = rings, sockets, timeout_s
        self._position = 0
        self._written = self._taken = 0
        self._said = (0, 0)
        self._in_ring: deque[Piece] = deque()
        self._untaken: deque[Piece] = deque()
        self._heard = dict.fromkeys(sockets, (0, 0))
        self._half_read = dict.fromkeys(sockets, b"")
        self._gone: set[int] = set()
        self._rank_of = {s.fileno(): other for other, s in sockets.items()}
        self._poll = select.poll()
        for s in sockets.values():
            s.setblocking(True)
            self._poll.register(s, select.POLLIN)

    def write(self, parts: Sequence[torch.Tensor], take: Callable[[list[torch.Tensor]], None]) -> Piece:
        """Copy the parts, one after the other, to the next place, and say so.

        Args:
            parts: of one dtype, together at most RING_BYTES / 2.
            take: given the places of all ranks, by rank, as flat tensors; called once, by finish() or before.
        """
        sizes = [part.numel() for part in parts]
        num_bytes = sum(sizes) * parts[0].element_size()
        begin = self._position
        if begin % RING_BYTES + num_bytes > RING_BYTES:  # not around the end
            begin += -begin % RING_BYTES
        self._position = begin + num_bytes + -num_bytes % _ALIGNMENT
        while self._in_ring and self._in_ring[0].begin < self._position - RING_BYTES:
            self._await_taken(self._in_ring[0])
            self._in_ring.popleft()
        place = begin % RING_BYTES
        slots = [ring[place : place + num_bytes].view(parts[0].dtype) for ring in self._rings]
        for slot, part in zip(slots[self.rank].split(sizes), parts, strict=True):
            slot.copy_(part.reshape(-1))
        piece = Piece(self._written, begin, take, slots)
        self._in_ring.append(piece)
        self._untaken.append(piece)
        self._written += 1
        self._say()
        return piece

    def finish(self, piece: Piece) -> None:
        """Take it, once every rank has written it."""
        if piece.taken:
            return
        for other in self._sockets:
            while self._heard[other][0] <= piece.number:
                self._listen(other)
        piece.take(piece.slots)
        piece.taken = True
        while self._untaken and self._untaken[0].taken:
            self._untaken.popleft()
            self._taken += 1

    def _await_taken(self, piece: Piece) -> None:
        """By all. Whoever waits here takes its own pieces first, and says so: no two ranks wait for each other."""
        while self._taken <= piece.number:
            self.finish(self._untaken[0])
        for other in self._sockets:
            while self._heard[other][1] <= piece.number:
                self._say()
                self._listen(other)

    def _say(self) -> None:
        message = (self._written, self._taken)
        if message == self._said:
            return
        self._said = message
        for other, s in self._sockets.items():
            try:
                s.sendall(_MESSAGE.pack(*message))
            except OSError as error:  # what it has written may still be read; what it has not, _listen misses
                if not isinstance(error, BrokenPipeError | ConnectionResetError):
                    raise
                self._gone.add(other)

    def _listen(self, wanted: int) -> None:
        """Read messages until there was one, of any rank; `wanted` is whose is missed if there is none."""
        begin = time.perf_counter()
        while True:
            waited_s = time.perf_counter() - begin
            events = self._poll.poll(0 if waited_s < _SPIN_S else 1e3 * max(0.0, self._timeout_s - waited_s))
            for descriptor, _ in events:
                self._read(self._rank_of[descriptor])
            if events:
                return
            if wanted in self._gone or waited_s >= self._timeout_s:
                why = "is gone" if wanted in self._gone else f"did not come within {self._timeout_s:g} s"
                raise RuntimeError(f"rank {self.global_ranks[wanted]} {why}, in a collective through shared memory")

    def _read(self, other: int) -> None:
        try:
            received = self._sockets[other].recv(_MESSAGE.size * 64)
        except ConnectionResetError:
            received = b""
        if not received:
            self._gone.add(other)
            self._poll.unregister(self._sockets[other])
            return
        received = self._half_read[other] + received
        whole = len(received) // _MESSAGE.size * _MESSAGE.size
        self._half_read[other] = received[whole:]
        if whole:
            self._heard[other] = _MESSAGE.unpack(received[whole - _MESSAGE.size : whole])


def meet(group: dist.ProcessGroup, global_ranks: list[int], timeout_s: float, wanted: bool) -> HostRing | None:
    """The ring of a group, or None on all of its ranks where one does not want it or cannot map all others.

    Communication: two all-gathers of a few bytes a rank.
    """
    rank, size = group.rank(), group.size()
    ring: HostRing | None = None
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = os.path.join(folder, "s")  # only this user may look in there
        try:
            listener.bind(path)
            listener.listen(size)
        except OSError:  # a path too long, a file system without sockets
            wanted = False
        place = f"{socket.gethostname()}\n{path}" if wanted and size <= MOST_RANKS else ""
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
    os.ftruncate(own, RING_BYTES)
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
        return torch.frombuffer(mmap.mmap(descriptor, RING_BYTES), dtype=torch.uint8)

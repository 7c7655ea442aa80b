"""Collectives of CPU tensors among ranks of one host: a ring of memory for each rank, written by it, read by all.

gloo sends through the loopback: every byte is copied by the kernel and by threads, on the cores of the products. Here a
rank copies what it sends into its ring, once, when the collective starts; and sums, or copies, straight from the rings
of all ranks when it waits. In between nothing runs: what is computed there hides that others come later.

    begin   says which collective comes next: of which kind, dtype and number of bytes
    write   a piece goes to a place of this rank's ring, and a message of 32 bytes to every other rank says so
    take    for a piece that every rank has written: read their places, which are the same as this rank's, since all
            ranks write pieces of the same sizes in the same order

Ranks that disagree would read each other's numbers as what they are not. So a message says which collective a piece is
of, and before a piece is taken every rank compares what it says itself with what the others say.

A place is written again when every rank has taken what was there. The messages go through Unix sockets: the kernel
orders them behind the writes to memory that come before, and they break when a rank ends.

Sums are in the order of the ranks, the same bits on all of them; of 16-bit types in float32, rounded once.
"""

import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from fused_megatron.checks import dtype_name

RING_BYTES = 16 << 20
# Several pieces fit the ring, so that none waits for the one before it to be taken.
_PIECE_BYTES = RING_BYTES // 4
_ALIGNMENT = 64  # of places: a cache line
# About what it costs to sleep and be woken; for longer, the core belongs to whoever else has work.
_SPIN_S = 50e-6
# Pieces written so far, and pieces taken; of the last piece written, what Collective says.
_MESSAGE = struct.Struct("<qqqIBBxx")
KINDS = ("all_reduce", "all_gather", "all_to_all")
_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


class LostPeerError(RuntimeError):
    """Another rank is gone, or did not come in time."""


class Collective(NamedTuple):
    """What the ranks of a group must agree on.

    Attributes:
        num_bytes: of what a rank sends.
        number: how many collectives of the group came before.
        kind: index in KINDS.
        dtype: index in the sorted dtypes of torch.
    """

    num_bytes: int
    number: int
    kind: int
    dtype: int

    def describe(self) -> str:
        """In words."""
        return f"{KINDS[self.kind]} of {self.num_bytes} bytes of {dtype_name(_DTYPES[self.dtype])}"


Take = Callable[[list[torch.Tensor]], None]
"""Given the places of all ranks, by rank, as flat tensors; called once."""
Parts = list[tuple[list[torch.Tensor], Take]]
"""For each piece of a collective: the tensors that this rank writes, and what takes them from all ranks."""


@dataclass
class Piece:
    """What one message is about: a part of a collective under way."""

    ring: "HostRing"
    number: int
    begin: int  # of its place, counted on from the first round of the ring
    take: Take
    slots: list[torch.Tensor]
    taken: bool = False

    def wait(self) -> None:
        """Take it, once every rank has written it."""
        self.ring.finish(self)


class HostRing:
    """The rings of all ranks, and the sockets that join the ranks.

    For one thread of one process: two threads would start their collectives in another order on every rank. Another
    thread may go on when the first has ended.

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
        self._process, self._thread = os.getpid(), threading.current_thread()
        self._num_begun = 0
        self._collective = Collective(0, 0, 0, 0)
        # Of the pieces that are not compared yet: this rank's, and what each other rank says, by the piece's number.
        self._own_collectives: dict[int, Collective] = {}
        self._their_collectives: dict[int, dict[int, Collective]] = {other: {} for other in sockets}
        self._num_compared = 0
        self._disagreement: str | None = None
        self._gone: set[int] = set()
        self._rank_of = {s.fileno(): other for other, s in sockets.items()}
        self._poll = select.poll()
        for s in sockets.values():
            s.setblocking(True)
            self._poll.register(s, select.POLLIN)

    def begin(self, kind: str, source: torch.Tensor) -> None:
        """Say which collective the next pieces are of; also of one that has none.

        Args:
            kind: of KINDS.
            source: what this rank sends.

        Raises:
            RuntimeError: in another thread than before, in a forked process, or after ranks disagreed.
        """
        self._check_caller()
        if self._disagreement is not None:
            raise RuntimeError(self._disagreement)
        num_bytes = source.numel() * source.element_size()
        number = self._num_begun % 2**32
        self._collective = Collective(num_bytes, number, KINDS.index(kind), _DTYPES.index(source.dtype))
        self._num_begun += 1

    def write(self, parts: Sequence[torch.Tensor], take: Take) -> Piece:
        """Copy the parts, one after the other, to the next place, and say so.

        Args:
            parts: of one dtype, together at most RING_BYTES / 2.
            take: called by the wait for this piece, or before.
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
        piece = Piece(self, self._written, begin, take, slots)
        self._in_ring.append(piece)
        self._untaken.append(piece)
        self._own_collectives[piece.number] = self._collective
        self._written += 1
        self._say()
        return piece

    def finish(self, piece: Piece) -> None:
        """Take it, once every rank has written it.

        Raises:
            RuntimeError: as begin; ranks disagree on this piece or one before it.
            LostPeerError: a rank is gone or silent.
        """
        self._check_caller()
        if piece.taken:
            return
        for other in self._sockets:
            while self._heard[other][0] <= piece.number:
                self._listen(other)
        self._compare(piece.number)
        piece.take(piece.slots)
        piece.taken = True
        while self._untaken and self._untaken[0].taken:
            self._untaken.popleft()
            self._taken += 1

    def _check_caller(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this process was forked from rank {self.global_ranks[self.rank]} and cannot use its process group "
                "(leave the collectives to the rank itself)"
            )
        thread = threading.current_thread()
        if thread is self._thread:
            return
        if self._num_begun and self._thread.is_alive():
            raise RuntimeError(
                f"thread {thread.name!r} of rank {self.global_ranks[self.rank]} uses a process group that thread "
                f"{self._thread.name!r} uses: two threads start collectives in another order on every rank (leave them "
                "to one thread, or give each a group of its own with torch.distributed.new_group)"
            )
        self._thread = thread

    def _compare(self, last: int) -> None:
        """What all ranks say of the pieces up to one. Of all, since after a difference the places differ, too."""
        for number in range(self._num_compared, last + 1):
            own = self._own_collectives.pop(number)
            for other, said in sorted(self._their_collectives.items()):
                theirs = said.pop(number)
                if theirs != own and self._disagreement is None:
                    self._disagreement = self._describe_difference(own, other, theirs)
        self._num_compared = max(self._num_compared, last + 1)
        if self._disagreement is not None:
            raise RuntimeError(self._disagreement)

    def _describe_difference(self, own: Collective, other: int, theirs: Collective) -> str:
        said = sorted([(self.rank, own), (other, theirs)])
        texts = [f"rank {self.global_ranks[r]} has {c.describe()} (its number {c.number} there)" for r, c in said]
        return (
            f"ranks disagree on a collective of their group: {', '.join(texts)}; all ranks must start the same "
            "collectives in the same order, with tensors of one size and dtype"
        )

    def _await_taken(self, piece: Piece) -> None:
        """By all. Whoever waits here takes its own pieces first, and says so: no two ranks wait for each other."""
        while self._taken <= piece.number:
            self.finish(self._untaken[0])
        for other in self._sockets:
            while self._heard[other][1] <= piece.number:
                self._say()
                self._listen(other)

    def _say(self) -> None:
        if (self._written, self._taken) == self._said:
            return
        self._said = (self._written, self._taken)
        message = (*self._said, *self._collective)
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
                raise LostPeerError(f"rank {self.global_ranks[wanted]} {why}, in a collective through shared memory")

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
        for written, taken, *collective in _MESSAGE.iter_unpack(received[:whole]):
            if written > self._heard[other][0]:  # by one: every piece has a message of its own
                self._their_collectives[other][written - 1] = Collective(*collective)
            self._heard[other] = (written, taken)


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


def cut_all_reduce(ring: HostRing, destination: torch.Tensor, source: torch.Tensor) -> Parts:
    """The pieces of an all-reduce of one tensor, which is source and destination."""
    flat = source.view(-1)
    return [([part], partial(add_in_order, part)) for part in flat.split(_elements(flat)) if part.numel()]


def cut_all_gather(ring: HostRing, destination: torch.Tensor, source: torch.Tensor) -> Parts:
    """The pieces of an all-gather of source [n] into destination [R n]."""
    flat = source.view(-1)
    size = _elements(flat)
    parts = zip(flat.split(size), destination.view(ring.num_ranks, -1).split(size, dim=1), strict=True)
    return [([part], partial(_copy_rows, columns)) for part, columns in parts if part.numel()]


def cut_all_to_all(ring: HostRing, destination: torch.Tensor, source: torch.Tensor) -> Parts:
    """The pieces of an all-to-all: of source [R n] block r goes to rank r, whose block stands at this rank's place."""
    received, sent = (x.view(ring.num_ranks, -1) for x in (destination, source))
    size = max(1, _elements(sent) // ring.num_ranks)

    def take(columns: torch.Tensor, slots: list[torch.Tensor]) -> None:
        _copy_rows(columns, [slot.view(ring.num_ranks, -1)[ring.rank] for slot in slots])

    parts = zip(sent.split(size, dim=1), received.split(size, dim=1), strict=True)
    return [(list(part), partial(take, columns)) for part, columns in parts if part.numel()]


def _copy_rows(to: torch.Tensor, rows: list[torch.Tensor]) -> None:
    for own, row in zip(to, rows, strict=True):
        own.copy_(row)


def _elements(x: torch.Tensor) -> int:
    return max(1, _PIECE_BYTES // x.element_size())

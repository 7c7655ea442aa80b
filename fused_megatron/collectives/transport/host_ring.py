"""Collectives of CPU tensors among ranks of one host: each rank writes to a ring of memory that all ranks read.

gloo sends through the loopback: the kernel and gloo's threads copy every byte, on the cores of the products. Here a
rank copies what it sends into its ring once, when the collective starts. When it waits, it sums or copies directly from
the rings of all ranks. In between nothing runs; work of the rank in this time hides that other ranks start later.

    begin   states the next collective: its kind, dtype and number of bytes
    write   copies a piece into a slot of this rank's ring, and announces it to every other rank in a message of 32
            bytes
    take    reads the slots of a piece that every rank has written. Their offsets are equal in all rings, since all
            ranks reserve slots of the same sizes in the same order (a rank may write less than its slot holds)

Ranks that disagree on a collective would misread each other's data. So each message states the collective, and before a
rank takes a piece it compares its own statement with the statements of the other ranks.

A slot is written again after every rank has taken its piece. The messages go through Unix sockets: the kernel orders
them after earlier writes to memory, and a socket breaks when its rank ends.

Sums are in rank order, bitwise the same on all ranks; 16-bit types are summed in float32 and rounded once.
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
from math import prod
from typing import NamedTuple

import torch

from fused_megatron.checks import dtype_name

RING_BYTES = 16 << 20
# Several pieces fit in the ring, so that a piece need not wait until the one before it is taken.
PIECE_BYTES = RING_BYTES // 4
_ALIGNMENT = 64  # of slots, in bytes: a cache line
# About the time to sleep and be woken. A longer spin would take the core from other work.
_SPIN_S = 50e-6
# Number of pieces written so far, number of pieces taken, and the Collective of the last piece written.
_MESSAGE = struct.Struct("<qqqIBBxx")
KINDS = ("all_reduce", "all_gather", "all_to_all", "reduce_scatter", "exchange")
_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


class LostPeerError(RuntimeError):
    """Another rank is gone, or did not answer in time."""


class Collective(NamedTuple):
    """Description of a collective, on which the ranks of a group must agree.

    Attributes:
        num_bytes: bytes that a rank sends; in an exchange, bytes that all ranks send together.
        number: number of earlier collectives of the group.
        kind: index in KINDS.
        dtype: index in the sorted dtypes of torch.
    """

    num_bytes: int
    number: int
    kind: int
    dtype: int

    def describe(self) -> str:
        """Return the description as text."""
        return f"{KINDS[self.kind]} of {self.num_bytes} bytes of {dtype_name(_DTYPES[self.dtype])}"


Take = Callable[[list[torch.Tensor]], None]
"""Reads a piece from the slots of all ranks (flat tensors, by rank); called once."""


@dataclass
class Piece:
    """A part of a collective under way, which one message announces."""

    ring: "HostRing"
    number: int
    begin: int  # byte offset of its slot, counted on through all rounds of the ring
    take: Take
    slots: list[torch.Tensor]
    taken: bool = False

    def wait(self) -> None:
        """Take the piece, once every rank has written it."""
        self.ring.finish(self)


class HostRing:
    """Rings of all ranks, and the sockets between the ranks.

    One thread of one process may use it: two threads would start their collectives in a different order on each rank.
    Another thread may continue after the first has ended.

    Args:
        rank: index of this rank in the group.
        global_ranks: global rank of each rank of the group.
        rings: [RING_BYTES] uint8 for every rank of the group.
        sockets: socket to every other rank, by its index in the group.
        timeout_s: seconds to wait for another rank.
    """

    def __init__(
        self,
        rank: int,
        global_ranks: list[int],
        rings: Sequence[torch.Tensor],
        sockets: dict[int, socket.socket],
        timeout_s: float,
    ) -> None:
        self.rank = rank
        self.global_ranks = global_ranks
        self.num_ranks = len(rings)
        self._rings = rings
        self._sockets = sockets
        self._timeout_s = timeout_s
        self._position = 0
        # Counts of written and of taken pieces: this rank's, as last announced, and as announced by every other rank.
        self._written = self._taken = 0
        self._announced = (0, 0)
        self._their_counts = dict.fromkeys(sockets, (0, 0))
        self._in_ring: deque[Piece] = deque()
        self._untaken: deque[Piece] = deque()
        self._half_read = dict.fromkeys(sockets, b"")
        self._process, self._thread = os.getpid(), threading.current_thread()
        self._num_begun = 0
        self._collective = Collective(0, 0, 0, 0)
        # Collectives of the pieces that are not compared yet, by number of the piece: of this rank, of each other rank.
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

    def begin(self, kind: str, source: torch.Tensor, num_elements: int | None = None) -> None:
        """Begin a collective, whose pieces are written next (none for an empty tensor).

        Args:
            kind: one of KINDS.
            source: the tensor that this rank sends.
            num_elements: number of elements on which the ranks agree; None: of `source`.

        Raises:
            RuntimeError: in another thread than before, in a forked process, or after ranks disagreed.
        """
        self._check_caller()
        if self._disagreement is not None:
            raise RuntimeError(self._disagreement)
        num_bytes = (source.numel() if num_elements is None else num_elements) * source.element_size()
        number = self._num_begun % 2**32
        self._collective = Collective(num_bytes, number, KINDS.index(kind), _DTYPES.index(source.dtype))
        self._num_begun += 1

    def write(self, parts: Sequence[torch.Tensor], take: Take, slot_elements: int | None = None) -> Piece:
        """Copy a piece into the next slot, and announce it.

        Args:
            parts: tensors of one dtype that form the piece, together at most RING_BYTES / 2.
            take: reads the piece from all ranks; called by the wait for this piece, or before.
            slot_elements: size of the slot, the same on every rank; None: of `parts`, which then are.
        """
        sizes = [part.numel() for part in parts]
        num_elements = sum(sizes) if slot_elements is None else slot_elements
        num_bytes = num_elements * parts[0].element_size()
        begin = self._position
        if begin % RING_BYTES + num_bytes > RING_BYTES:  # a slot does not wrap around the end of the ring
            begin += -begin % RING_BYTES
        self._position = begin + num_bytes + -num_bytes % _ALIGNMENT
        while self._in_ring and self._in_ring[0].begin < self._position - RING_BYTES:
            self._wait_until_taken(self._in_ring[0])
            self._in_ring.popleft()
        offset = begin % RING_BYTES
        slots = [ring[offset : offset + num_bytes].view(parts[0].dtype) for ring in self._rings]
        for slot, part in zip(slots[self.rank][: sum(sizes)].split(sizes), parts, strict=True):
            slot.copy_(part.reshape(-1))
        piece = Piece(self, self._written, begin, take, slots)
        self._in_ring.append(piece)
        self._untaken.append(piece)
        self._own_collectives[piece.number] = self._collective
        self._written += 1
        self._announce()
        return piece

    def finish(self, piece: Piece) -> None:
        """Take a piece, once every rank has written it.

        Raises:
            RuntimeError: as begin; also if ranks disagree on this piece or an earlier one.
            LostPeerError: a rank is gone or silent.
        """
        self._check_caller()
        if piece.taken:
            return
        for other in self._sockets:
            while self._their_counts[other][0] <= piece.number:
                self._receive(other)
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
                f"{self._thread.name!r} uses: two threads start collectives in another order on each rank (leave them "
                "to one thread, or give each a group of its own with torch.distributed.new_group)"
            )
        self._thread = thread

    def _compare(self, last: int) -> None:
        """Compare the collectives of all pieces up to `last`: after a difference the slots of later pieces differ, too.

        Raises:
            RuntimeError: ranks disagree.
        """
        for number in range(self._num_compared, last + 1):
            own = self._own_collectives.pop(number)
            for other, by_number in sorted(self._their_collectives.items()):
                theirs = by_number.pop(number)
                if theirs != own and self._disagreement is None:
                    self._disagreement = self._describe_difference(own, other, theirs)
        self._num_compared = max(self._num_compared, last + 1)
        if self._disagreement is not None:
            raise RuntimeError(self._disagreement)

    def _describe_difference(self, own: Collective, other: int, theirs: Collective) -> str:
        both = sorted([(self.rank, own), (other, theirs)])
        texts = [f"rank {self.global_ranks[r]} has {c.describe()} (its number {c.number} there)" for r, c in both]
        return (
            f"ranks disagree on a collective of their group: {', '.join(texts)}; all ranks must start the same "
            "collectives in the same order, with tensors of one size and dtype"
        )

    def _wait_until_taken(self, piece: Piece) -> None:
        """Wait until all ranks have taken a piece.

        A rank that waits here first takes its own pieces, and announces so; thus no two ranks wait for each other.
        """
        while self._taken <= piece.number:
            self.finish(self._untaken[0])
        for other in self._sockets:
            while self._their_counts[other][1] <= piece.number:
                self._announce()
                self._receive(other)

    def _announce(self) -> None:
        """Send the counts and the current collective to every other rank, if a count has changed."""
        if (self._written, self._taken) == self._announced:
            return
        self._announced = (self._written, self._taken)
        message = (*self._announced, *self._collective)
        for other, s in self._sockets.items():
            try:
                s.sendall(_MESSAGE.pack(*message))
            except OSError as error:  # the rank ended: its pieces can still be read; _receive reports a missing one
                if not isinstance(error, BrokenPipeError | ConnectionResetError):
                    raise
                self._gone.add(other)

    def _receive(self, wanted: int) -> None:
        """Wait for at least one message from any rank, and read it.

        Raises:
            LostPeerError: no message came in time, or rank `wanted` is gone.
        """
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
            if written > self._their_counts[other][0]:  # by one, since every piece has its own message
                self._their_collectives[other][written - 1] = Collective(*collective)
            self._their_counts[other] = (written, taken)


Parts = list[tuple[list[torch.Tensor], Take, int | None]]
"""For each piece of a collective: the tensors that this rank writes, the function that reads all ranks' slots, and the
number of elements of a slot (None: of the tensors, which have the same size on every rank)."""


def add_in_order(total: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """Write the sum of the parts, first to last, into total; 16-bit types are summed in float32 and rounded once."""
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
    """Cut an all-reduce into pieces; one tensor is source and destination."""
    flat = source.view(-1)
    return [([part], partial(add_in_order, part), None) for part in flat.split(_elements(flat)) if part.numel()]


def cut_all_gather(ring: HostRing, destination: torch.Tensor, source: torch.Tensor) -> Parts:
    """Cut an all-gather of source [n] into destination [R n] into pieces."""
    flat = source.view(-1)
    size = _elements(flat)
    parts = zip(flat.split(size), destination.view(ring.num_ranks, -1).split(size, dim=1), strict=True)
    return [([part], partial(_copy_rows, columns), None) for part, columns in parts if part.numel()]


def cut_all_to_all(ring: HostRing, destination: torch.Tensor, source: torch.Tensor) -> Parts:
    """Cut an all-to-all into pieces: block r of source [R n] goes to rank r, where block s comes from rank s."""
    received, sent = (x.view(ring.num_ranks, -1) for x in (destination, source))
    size = max(1, _elements(sent) // ring.num_ranks)

    def take(columns: torch.Tensor, slots: list[torch.Tensor]) -> None:
        _copy_rows(columns, [slot.view(ring.num_ranks, -1)[ring.rank] for slot in slots])

    parts = zip(sent.split(size, dim=1), received.split(size, dim=1), strict=True)
    return [(list(part), partial(take, columns), None) for part, columns in parts if part.numel()]


def cut_reduce_scatter(ring: HostRing, destination: torch.Tensor, source: torch.Tensor) -> Parts:
    """Cut a reduce-scatter into pieces: the sum over the ranks of block r of source [R n] goes to rank r, [n]."""
    sent, total = source.view(ring.num_ranks, -1), destination.view(-1)
    size = max(1, _elements(sent) // ring.num_ranks)

    def take(columns: torch.Tensor, slots: list[torch.Tensor]) -> None:
        add_in_order(columns, [slot.view(ring.num_ranks, -1)[ring.rank] for slot in slots])

    parts = zip(sent.split(size, dim=1), total.split(size), strict=True)
    return [(list(part), partial(take, columns), None) for part, columns in parts if part.numel()]


def cut_exchange(
    ring: HostRing, destination: torch.Tensor, source: torch.Tensor, sizes: Sequence[Sequence[int]]
) -> Parts:
    """Cut an exchange of uneven blocks into pieces.

    Args:
        ring: the ranks.
        destination: [rows that this rank receives, ..], by the rank that sends them.
        source: [rows that this rank sends, ..], by the rank that receives them.
        sizes: for each rank the number of rows that it sends to each rank; the same on every rank, so that all of them
            make the same pieces.
    """
    width, longest = prod(source.shape[1:]), max(map(max, sizes))
    step = max(1, PIECE_BYTES // (ring.num_ranks * max(1, width) * source.element_size()))
    outgoing = source.split(list(sizes[ring.rank]))
    incoming = destination.split([of_rank[ring.rank] for of_rank in sizes])

    def take(blocks: list[torch.Tensor], begins: list[int], slots: list[torch.Tensor]) -> None:
        for block, begin, slot in zip(blocks, begins, slots, strict=True):
            if block.numel():
                block.view(-1).copy_(slot[begin * width : begin * width + block.numel()])

    parts: Parts = []
    for first in range(0, longest if width else 0, step):
        rows = [[max(0, min(step, size - first)) for size in of_rank] for of_rank in sizes]
        blocks = [block[first : first + step] for block in incoming]
        begins = [sum(of_rank[: ring.rank]) for of_rank in rows]
        written = [block[first : first + step] for block in outgoing]
        parts.append((written, partial(take, blocks, begins), max(map(sum, rows)) * width))
    return parts


def _copy_rows(to: torch.Tensor, rows: list[torch.Tensor]) -> None:
    for own, row in zip(to, rows, strict=True):
        own.copy_(row)


def _elements(x: torch.Tensor) -> int:
    return max(1, PIECE_BYTES // x.element_size())

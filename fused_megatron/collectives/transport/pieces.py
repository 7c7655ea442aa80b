"""Pieces of collectives through a ring of shared memory: what a rank writes into a slot, and reads from all slots."""

from collections.abc import Sequence
from functools import partial
from math import prod

import torch

from fused_megatron.collectives.transport import host_ring
from fused_megatron.collectives.transport.host_ring import HostRing, Take

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
    step = max(1, host_ring.PIECE_BYTES // (ring.num_ranks * max(1, width) * source.element_size()))
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
    return max(1, host_ring.PIECE_BYTES // x.element_size())

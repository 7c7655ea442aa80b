"""A matrix product and its collective, cut into chunks of rows so that each hides under the other.

Three shapes of the one idea. While the collective of a chunk is under way the product of the next is made, or the other
way round. One chunk is the plain path: the whole product, then (or after) the whole collective.

Rows are independent of each other, so chunks change no sum inside a product. The sum over ranks is made by the backend:
where its order depends on an element's place in the message (a ring of three ranks or more), chunks may change the last
bit of a float32 sum.
"""

import itertools
from collections.abc import Sequence
from math import gcd, prod

import torch

from fused_megatron.collectives.groups import Group, group_rank, group_size
from fused_megatron.collectives.transfers import (
    start_all_gather,
    start_all_reduce_,
    start_reduce_scatter,
    start_reduce_scatter_blocks,
)
from fused_megatron.collectives.transport.transfer import Transfer
from fused_megatron.ops.product import product
from fused_megatron.overlap import symmetric_memory
from fused_megatron.overlap.cost_model import BY_SYMMETRIC_MEMORY, chunk_parts

# Rows of a tile of the GPU's matrix products: a chunk that ends inside one would compute the rest for nothing.
_TILE_ROWS = 128


class Transfers:
    """Transfers under way, each filling its part of one result."""

    def __init__(self, transfers: Sequence[Transfer], result: torch.Tensor) -> None:
        self._transfers, self._result = transfers, result

    def wait(self) -> torch.Tensor:
        """The result, whole; call once."""
        for transfer in self._transfers:
            transfer.wait()
        return self._result


def start_product_all_reduce(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: Group, num_chunks: int
) -> Transfers:
    """sum over ranks of x [.., I] @ weight [O, I].T, + bias once: [.., O]. Its last transfers are still under way."""
    bias = of_first_rank(bias, group)
    rows = x.reshape(-1, x.shape[-1])
    y = rows.new_empty(rows.shape[0], weight.shape[0])
    transfers = []
    for begin, end in chunk_edges(rows.shape[0], num_chunks, tile_steps(x, 1)):
        product(rows[begin:end], weight, bias, out=y[begin:end])
        transfers.append(start_all_reduce_(y[begin:end], group))
    return Transfers(transfers, y.view(*x.shape[:-1], weight.shape[0]))


def start_product_reduce_scatter(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dim: int, group: Group, num_chunks: int
) -> Transfer | Transfers:
    """This rank's block of dim of the sum over ranks of x @ weight.T, + bias once.

    x [S, .., I] -> [S / R, .., O] for dim 0. Only there is it cut: elsewhere the blocks of a chunk would have to be
    gathered from all over x first.
    """
    ranks = group_size(group)
    if num_chunks == BY_SYMMETRIC_MEMORY:
        assert group is not None
        return Transfer(None, (symmetric_memory.product_reduce_scatter(x, weight, bias, group),))
    bias = of_first_rank(bias, group)
    if num_chunks == 1 or ranks == 1 or not leads(x, dim):
        return start_reduce_scatter(product(x, weight, bias), dim, group)
    block, width = x.shape[dim] // ranks, weight.shape[0]
    between = x.shape[dim + 1 : -1]
    by_rank = x.reshape(ranks, block, *between, x.shape[-1])
    y = x.new_empty(*x.shape[:dim], block, *between, width)
    y_rows = y.view(block, *between, width)
    transfers = []
    for begin, end in chunk_edges(block, num_chunks, tile_steps(x, prod(between))):
        partial = x.new_empty(ranks, end - begin, *between, width)
        for rank in range(ranks):
            product(rows_of(by_rank[rank, begin:end]), weight, bias, out=rows_of(partial[rank]))
        transfers.append(start_reduce_scatter_blocks(partial, y_rows[begin:end], group))
    return Transfers(transfers, y)


def gather_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dim: int,
    group: Group,
    num_chunks: int,
    *,
    keep_gathered: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, gathered): gathered is x of all ranks along dim, y = gathered @ weight.T + bias.

    x [S / R, .., I] -> y [S, .., O] for dim 0. This rank's own block is multiplied while the first chunks of the others
    travel. `gathered` is None unless it is asked for.
    """
    ranks = group_size(group)
    if num_chunks == BY_SYMMETRIC_MEMORY:
        assert group is not None
        return symmetric_memory.gather_product(x, weight, bias, group, keep_gathered)
    if num_chunks == 1 or ranks == 1 or not leads(x, dim):
        whole = start_all_gather(x, dim, group).wait()
        return product(whole, weight, bias), whole if keep_gathered else None
    own = group_rank(group)
    block, between, width = x.shape[dim], x.shape[dim + 1 : -1], weight.shape[0]
    shard = x.reshape(block, *between, x.shape[-1]).contiguous()
    edges = chunk_edges(block, num_chunks, tile_steps(x, prod(between)))
    transfers = [start_all_gather(shard[begin:end].unsqueeze(0), 0, group) for begin, end in edges]
    y = x.new_empty(ranks, block, *between, width)
    gathered = x.new_empty(ranks, *shard.shape) if keep_gathered else None
    product(rows_of(shard), weight, bias, out=rows_of(y[own]))
    if gathered is not None:
        gathered[own] = shard
    for (begin, end), transfer in zip(edges, transfers, strict=True):
        chunk = transfer.wait()
        for rank in range(ranks):
            if rank == own:
                continue
            product(rows_of(chunk[rank]), weight, bias, out=rows_of(y[rank, begin:end]))
            if gathered is not None:
                gathered[rank, begin:end] = chunk[rank]
    full_shape = (*x.shape[:dim], ranks * block, *between)
    return y.view(*full_shape, width), None if gathered is None else gathered.view(*full_shape, x.shape[-1])


def chunk_edges(length: int, num_chunks: int, multiple: int = 1) -> list[tuple[int, int]]:
    """[begin, end) of at most num_chunks chunks, short ones at both ends, which begin at multiples of `multiple`.

    Nothing hides the first product, nor the last transfer: so they are the shortest; see overlap.chunk_parts.
    Never empty: a length of 0 is one empty chunk, so that every rank issues at least one collective.
    """
    units = -(-length // multiple)
    count = max(1, min(num_chunks, units))
    # One unit for each chunk, and the rest in proportion.
    ends = [i + 1 + int((units - count) * done) for i, done in enumerate(itertools.accumulate(chunk_parts(count)))]
    ends = [min(length, end * multiple) for end in ends[:-1]] + [length]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def of_first_rank(bias: torch.Tensor | None, group: Group) -> torch.Tensor | None:
    """A bias that rides in the product of one rank alone: no pass over the sum of its own, and one rounding less."""
    return bias if group_rank(group) == 0 else None


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x [.., I] as a matrix."""
    return x.reshape(-1, x.shape[-1])


def leads(x: torch.Tensor, dim: int) -> bool:
    """Whether blocks of dim are contiguous: no dim before it."""
    return prod(x.shape[:dim]) == 1


def tile_steps(x: torch.Tensor, rows_per_step: int) -> int:
    """Steps of a dim that make whole tiles of rows."""
    return _TILE_ROWS // gcd(_TILE_ROWS, max(1, rows_per_step)) if x.device.type != "cpu" else 1

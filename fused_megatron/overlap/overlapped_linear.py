"""Linear products overlapped with their collectives.

A collective is issued before the product that hides it, and both are cut into chunks of rows: while the collective of
one chunk is under way, the product of the next chunk is computed, or the other way round. With one chunk the whole
collective follows, or precedes, the whole product.

Rows are independent of each other, so chunks change no sum inside a product. The backend sums over ranks. If the order
of its sum depends on the index of an element in the message (a ring of three ranks or more), chunks may change the last
bit of a float32 sum.

Shapes are per rank, for R ranks, activations [S, B, ..] and sequence dim 0.
"""

import functools
import warnings
from math import prod
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.collectives.groups import Group, group_rank, group_size
from fused_megatron.collectives.transfers import (
    Transfer,
    start_all_gather,
    start_all_reduce_,
    start_reduce_scatter,
    start_reduce_scatter_blocks,
)
from fused_megatron.ops.autograd_function import AutogradFunction
from fused_megatron.ops.product import product
from fused_megatron.overlap import symmetric_memory
from fused_megatron.overlap.chunk_choice import ChunkChoice
from fused_megatron.overlap.chunks import chunk_edges, tile_steps
from fused_megatron.overlap.timed_ways import BY_SYMMETRIC_MEMORY
from fused_megatron.overlap.weight_gradients import GradientDestination


class ColumnLinearFunction(AutogradFunction):
    """x @ weight.T + bias with a weight sharded over its output features: tensor_parallel.column_parallel_linear.

    sequence_dim None:
        x            [S, B, H]        replicated
        forward      y_shard_o  [S, B, O / R] = x @ w_shard_o.T + b_shard_o
        backward     dx         [S, B, H]     = all_reduce(dy_shard_o @ w_shard_o)
    sequence_dim given (0 here):
        x_shard_s    [S / R, B, H]    this rank's block of the sequence
        forward      y_shard_o  [S, B, O / R] = all_gather(x_shard_s) @ w_shard_o.T + b_shard_o
        backward     dx_shard_s [S / R, B, H] = reduce_scatter(dy_shard_o @ w_shard_o)
    both:
        backward     dw_shard_o [O / R, H] = dy_shard_o.T @ x;  db_shard_o [O / R] = sum over S, B of dy_shard_o

    Inputs are not checked. With chunks each chunk has its own collective; the total of bytes stays the same. The saved
    x is this rank's shard, not the gathered sequence. Without a gradient of x backward has no reduction.
    """

    op = "tensor_parallel.column_parallel_linear"

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sequence_dim: int | None,
        group: Group,
        choice: ChunkChoice,
    ) -> torch.Tensor:
        if sequence_dim is None:
            y = product(x, weight, bias)
        else:
            num_chunks = choice.for_gather(x, weight, sequence_dim, group, gather_product_of)
            y, _ = gather_product(x, weight, bias, sequence_dim, group, num_chunks)
        _save(ctx, x, weight, sequence_dim, group, choice)
        return _own(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        needs_dx, needs_dweight, needs_dbias, *_ = ctx.needs_input_grad
        x, weight = ctx.saved_tensors
        sequence_dim, group, choice = ctx.layout
        dx, full_x = Transfer((), (dy,)), Transfer((), (x,))
        dweight = dbias = None
        if needs_dweight and sequence_dim is not None:
            full_x = start_all_gather(x, sequence_dim, group)  # hidden by the product for dx
        if needs_dx:  # its collective hides under its own product, and the rest under the product for dweight
            products = 2 if needs_dweight and not ctx.destination.later else 1
            num_chunks = choice.for_reduction(dy, weight.t(), sequence_dim, group, products, reduced_product_of)
            if sequence_dim is None:
                dx = start_product_all_reduce(dy, weight.t(), None, group, num_chunks)
            else:
                dx = start_product_reduce_scatter(dy, weight.t(), None, sequence_dim, group, num_chunks)
        if needs_dweight:
            dweight = ctx.destination.add(lambda: (rows_of(dy), rows_of(full_x.wait())))
        if needs_dbias:
            dbias = rows_of(dy).sum(0)
        return dx.wait() if needs_dx else None, dweight, dbias, None, None, None


class RowLinearFunction(AutogradFunction):
    """x @ weight.T + bias with a weight sharded over its input features: tensor_parallel.row_parallel_linear.

    x_shard_i    [S, B, I / R],  w_shard_i [O, I / R],  bias [O] replicated
    sequence_dim None:
        forward      y          [S, B, O]     = all_reduce(x_shard_i @ w_shard_i.T) + bias
        backward     dx_shard_i [S, B, I / R] = dy @ w_shard_i
    sequence_dim given (0 here):
        forward      y_shard_s  [S / R, B, O] = reduce_scatter(x_shard_i @ w_shard_i.T) + bias
        backward     dx_shard_i [S, B, I / R] = dy @ w_shard_i,  dy [S, B, O] = all_gather(dy_shard_s)
    both:
        backward     dw_shard_i [O, I / R] = dy.T @ x_shard_i;  dbias [O] = sum over S, B of dy

    Inputs are not checked. The bias is added once, in the product of the first rank, so that the collective needs no
    pass after it. With chunks each chunk has its own collective; the total of bytes stays the same.
    """

    op = "tensor_parallel.row_parallel_linear"

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sequence_dim: int | None,
        group: Group,
        choice: ChunkChoice,
    ) -> torch.Tensor:
        num_chunks = choice.for_reduction(x, weight, sequence_dim, group, run=reduced_product_of)
        if sequence_dim is None:
            y = start_product_all_reduce(x, weight, bias, group, num_chunks)
        else:
            y = start_product_reduce_scatter(x, weight, bias, sequence_dim, group, num_chunks)
        _save(ctx, x, weight, sequence_dim, group, choice)  # while the last transfer is under way
        return _own(y.wait())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        needs_dx, needs_dweight, needs_dbias, *_ = ctx.needs_input_grad
        x, weight = ctx.saved_tensors
        sequence_dim, group, choice = ctx.layout
        dx = None
        if sequence_dim is None:
            dx = product(dy, weight.t()) if needs_dx else None
        elif needs_dx:
            num_chunks = choice.for_gather(dy, weight.t(), sequence_dim, group, gather_product_of)
            dx, gathered = gather_product(dy, weight.t(), None, sequence_dim, group, num_chunks, keep_gathered=True)
            assert gathered is not None
            dy = gathered
        else:
            dy = start_all_gather(dy, sequence_dim, group).wait()
        return (
            dx,
            ctx.destination.add(lambda: (rows_of(dy), rows_of(x))) if needs_dweight else None,
            # dy has all positions by now, so every rank has the full gradient without a further collective.
            rows_of(dy).sum(0) if needs_dbias else None,
            None,
            None,
            None,
        )


def start_product_all_reduce(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: Group, num_chunks: int
) -> Transfer:
    """Start y [.., O] = sum over ranks of x [.., I] @ weight [O, I].T, + bias once; the last transfers are pending."""
    bias = of_first_rank(bias, group)
    rows = x.reshape(-1, x.shape[-1])
    y = rows.new_empty(rows.shape[0], weight.shape[0])
    transfers = []
    for begin, end in chunk_edges(rows.shape[0], num_chunks, tile_steps(x, 1)):
        product(rows[begin:end], weight, bias, out=y[begin:end])
        transfers.append(start_all_reduce_(y[begin:end], group))
    return Transfer(transfers, (y.view(*x.shape[:-1], weight.shape[0]),))


def start_product_reduce_scatter(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dim: int, group: Group, num_chunks: int
) -> Transfer:
    """Start the sum over ranks of x @ weight.T, + bias once; this rank keeps its block of dim.

    x [S, .., I] -> [S / R, .., O] for dim 0. Only dim 0 is cut into chunks: for another dim the rows of a chunk are
    scattered over x, and would need a copy.
    """
    ranks = group_size(group)
    if num_chunks == BY_SYMMETRIC_MEMORY:
        assert group is not None
        return Transfer((), (symmetric_memory.product_reduce_scatter(x, weight, bias, group),))
    bias = of_first_rank(bias, group)
    if num_chunks == 1 or ranks == 1 or not _can_be_cut(x, dim):
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
    return Transfer(transfers, (y,))


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
    """Gather x of all ranks along dim, and return (gathered @ weight.T + bias, gathered).

    x [S / R, .., I] -> y [S, .., O] for dim 0. This rank's own block is multiplied while the first chunks of the other
    ranks are under way. `gathered` is None without keep_gathered.
    """
    ranks = group_size(group)
    if num_chunks == BY_SYMMETRIC_MEMORY:
        assert group is not None
        return symmetric_memory.gather_product(x, weight, bias, group, keep_gathered)
    if num_chunks == 1 or ranks == 1 or not _can_be_cut(x, dim):
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


def gather_product_of(
    x: torch.Tensor, weight: torch.Tensor, dim: int | None, group: Group, num_chunks: int
) -> torch.Tensor:
    """Return gather_product without a bias, for ChunkChoice, which times it."""
    assert dim is not None
    return gather_product(x, weight, None, dim, group, num_chunks)[0]


def reduced_product_of(
    x: torch.Tensor, weight: torch.Tensor, dim: int | None, group: Group, num_chunks: int
) -> Transfer:
    """Start the sum over ranks of x @ weight.T without a bias, for ChunkChoice, which times it."""
    if dim is None:
        return start_product_all_reduce(x, weight, None, group, num_chunks)
    return start_product_reduce_scatter(x, weight, None, dim, group, num_chunks)


def of_first_rank(bias: torch.Tensor | None, group: Group) -> torch.Tensor | None:
    """Return the bias on the first rank, None on others: added in one rank's product, it needs no pass of its own."""
    return bias if group_rank(group) == 0 else None


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """Return x [.., I] as a matrix [rows, I]."""
    return x.reshape(-1, x.shape[-1])


def _can_be_cut(x: torch.Tensor, dim: int) -> bool:
    """Whether blocks of dim are contiguous: no dim before it. If not, warn once that nothing overlaps."""
    leads = prod(x.shape[:dim]) == 1
    if not leads:
        _warn_of_whole_products(dim)
    return leads


@functools.cache
def _warn_of_whole_products(dim: int) -> None:
    warnings.warn(
        f"overlap has no effect with sequence_dim={dim} and more than one sample: a block of the sequence is not "
        "contiguous, and products run whole (put the sequence first, [S, B, H], or take one sample at a time)",
        RuntimeWarning,
        stacklevel=3,
    )


def _save(ctx: Any, x: torch.Tensor, weight: torch.Tensor, *layout: Any) -> None:
    """Save the operands that the needed gradients are made of."""
    needs_dx, needs_dweight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if needs_dweight else None, weight if needs_dx else None)
    ctx.layout = layout
    ctx.destination = GradientDestination(weight)


def _own(y: torch.Tensor) -> torch.Tensor:
    """Return y as a tensor that is no view.

    Autograd refuses in-place changes of a view that a Function returns (an activation with inplace=True, +=).
    """
    own: torch.Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return own


def autocast_operands(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cast as torch's autocast does for torch.nn.functional.linear; before the collective, so that fewer bytes move."""
    device_type = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device_type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

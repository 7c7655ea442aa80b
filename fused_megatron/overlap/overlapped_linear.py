"""Linear products overlapped with the collective that goes with them.

The order of work is set by issuing a collective before the product that hides it, and by cutting both into chunks
(chunked_products). Shapes are those of one rank, for activations [S, B, ..] and sequence dim 0; R ranks.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.collectives.groups import Group, apply_on_ranks
from fused_megatron.collectives.transfers import start_all_gather
from fused_megatron.collectives.transport.transfer import Transfer
from fused_megatron.ops.product import product
from fused_megatron.overlap.chunked_products import (
    Transfers,
    gather_product,
    rows_of,
    start_product_all_reduce,
    start_product_reduce_scatter,
)
from fused_megatron.overlap.cost_model import PLAIN, ChunkChoice
from fused_megatron.overlap.weight_gradients import GradientDestination


def _save(ctx: Any, x: torch.Tensor, weight: torch.Tensor, *layout: Any) -> None:
    """What both backwards need: of x and the weight what the gradients that are asked for are made of."""
    needs_dx, needs_dweight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if needs_dweight else None, weight if needs_dx else None)
    ctx.layout = layout
    ctx.destination = GradientDestination(weight)


def _own(y: torch.Tensor) -> torch.Tensor:
    """y as no view: autograd refuses to change a Function's view in place (an activation with inplace=True, +=)."""
    own: torch.Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return own


class _ColumnLinear(torch.autograd.Function):
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
        _save(ctx, x, weight, sequence_dim, group, choice)
        if sequence_dim is None:
            return _own(product(x, weight, bias))
        num_chunks = choice.for_gather(x, weight, sequence_dim, group)
        return _own(gather_product(x, weight, bias, sequence_dim, group, num_chunks)[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        needs_dx, needs_dweight, needs_dbias, *_ = ctx.needs_input_grad
        x, weight = ctx.saved_tensors
        sequence_dim, group, choice = ctx.layout
        dx: Transfer | Transfers = Transfer(None, (dy,))
        full_x, dweight, dbias = Transfer(None, (x,)), None, None
        if needs_dweight and sequence_dim is not None:
            full_x = start_all_gather(x, sequence_dim, group)  # hidden by the product for dx
        if needs_dx:  # what of its collective the product itself does not hide, the product for dweight does
            products = 2 if needs_dweight and not ctx.destination.later else 1
            num_chunks = choice.for_reduction(dy, weight.t(), sequence_dim, group, hidden_products=products)
            if sequence_dim is None:
                dx = start_product_all_reduce(dy, weight.t(), None, group, num_chunks)
            else:
                dx = start_product_reduce_scatter(dy, weight.t(), None, sequence_dim, group, num_chunks)
        if needs_dweight:
            dweight = ctx.destination.add(lambda: (rows_of(dy), rows_of(full_x.wait())))
        if needs_dbias:
            dbias = rows_of(dy).sum(0)
        return dx.wait() if needs_dx else None, dweight, dbias, None, None, None


class _RowLinear(torch.autograd.Function):
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
        _save(ctx, x, weight, sequence_dim, group, choice)
        num_chunks = choice.for_reduction(x, weight, sequence_dim, group)
        if sequence_dim is None:
            return _own(start_product_all_reduce(x, weight, bias, group, num_chunks).wait())
        return _own(start_product_reduce_scatter(x, weight, bias, sequence_dim, group, num_chunks).wait())

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
            num_chunks = choice.for_gather(dy, weight.t(), sequence_dim, group)
            dx, gathered = gather_product(dy, weight.t(), None, sequence_dim, group, num_chunks, keep_gathered=True)
            assert gathered is not None
            dy = gathered
        else:
            dy = start_all_gather(dy, sequence_dim, group).wait()
        return (
            dx,
            ctx.destination.add(lambda: (rows_of(dy), rows_of(x))) if needs_dweight else None,
            # Of all positions, since dy is whole by now: the full gradient on every rank with no further collective.
            rows_of(dy).sum(0) if needs_dbias else None,
            None,
            None,
            None,
        )


def column_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sequence_dim: int | None,
    group: Group,
    choice: ChunkChoice = PLAIN,
) -> torch.Tensor:
    """Product with a weight sharded over its output features. Inputs are not checked.

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

    Args:
        choice: into how many chunks a product and its collective are cut, so that they overlap; see ChunkChoice.

    Communication: sequence_dim None: one all-reduce of x backward, under the products for dx and dw. Else one
        all-gather forward, under the product; backward one all-gather under the product for dx and one reduce-scatter
        under the products for dx and dw. None of those for x that needs no gradient or a frozen weight. With chunks,
        as many collectives of so much less; the bytes stay the same.
    Memory: x as given (the shard, not the gathered sequence) and the weight are saved.
    """
    return apply_on_ranks(_ColumnLinear, group, x, weight, bias, sequence_dim, group, choice)


def row_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sequence_dim: int | None,
    group: Group,
    choice: ChunkChoice = PLAIN,
) -> torch.Tensor:
    """Product with a weight sharded over its input features. Inputs are not checked.

    x_shard_i    [S, B, I / R],  w_shard_i [O, I / R],  bias [O] replicated
    sequence_dim None:
        forward      y          [S, B, O]     = all_reduce(x_shard_i @ w_shard_i.T) + bias
        backward     dx_shard_i [S, B, I / R] = dy @ w_shard_i
    sequence_dim given (0 here):
        forward      y_shard_s  [S / R, B, O] = reduce_scatter(x_shard_i @ w_shard_i.T) + bias
        backward     dx_shard_i [S, B, I / R] = dy @ w_shard_i,  dy [S, B, O] = all_gather(dy_shard_s)
    both:
        backward     dw_shard_i [O, I / R] = dy.T @ x_shard_i;  dbias [O] = sum over S, B of dy

    Args:
        choice: into how many chunks a product and its collective are cut, so that they overlap; see ChunkChoice.

    Communication: one all-reduce (reduce-scatter) of y forward, under the product; none (one all-gather of dy, under
        the product for dx) backward. With chunks, as many collectives of so much less; the bytes stay the same.
    Memory: x and the weight are saved. The collective works on the product itself; the bias is added once, in the
        product of the first rank.
    """
    return apply_on_ranks(_RowLinear, group, x, weight, bias, sequence_dim, group, choice)

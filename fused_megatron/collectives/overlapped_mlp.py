"""Both products of a tensor-parallel MLP as one function whose collectives hide under all of them.

Layer by layer, only the second product can hide the collective of the forward, and only the first layer's weight
gradient what is left of the backward's. Here chunks of rows go through both products, so that forward hides its
collectives under two products and backward under four:

    forward   for each chunk: up product, activation, down product; start the chunk's sum over the ranks
    backward  for each chunk: dy @ down, activation's gradient, @ up; start the chunk's sum over the ranks
              then both weight gradients; then wait
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.collectives.chunked_products import Transfers, chunk_edges, product_into, rows_of, tile_steps
from fused_megatron.collectives.groups import Group, group_rank, group_size
from fused_megatron.collectives.overlap import ChunkChoice
from fused_megatron.collectives.transfers import (
    Transfer,
    start_all_gather,
    start_all_reduce_,
    start_reduce_scatter_blocks,
)
from fused_megatron.collectives.weight_gradients import weight_gradient


class Activation(NamedTuple):
    """What is between the products, row by row, as raw functions without autograd.

    Attributes:
        forward: (h [T, F'], bias [F'] or None) -> a [T, F].
        backward: (da, h, bias, need_dh, need_dbias) -> (dh [T, F'], dbias [F']).
    """

    forward: Callable[..., torch.Tensor]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor]]


class _Layout(NamedTuple):
    """Rows as the products see them: `blocks` blocks (one a rank of a sharded sequence, else one) of equal length."""

    group: Group
    blocks: int
    edges: Sequence[tuple[int, int]]

    def gather(self, rows: torch.Tensor) -> list[Transfer]:
        """Chunks [blocks, m, I] of the rows of all blocks, all of them under way; rows are this rank's."""
        if self.blocks == 1:
            return [Transfer(None, [rows[begin:end].unsqueeze(0)]) for begin, end in self.edges]
        return [start_all_gather(rows[begin:end].unsqueeze(0), 0, self.group) for begin, end in self.edges]

    def partial(self, result: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Memory [blocks, m, O] for this rank's part of a sum."""
        if self.blocks == 1:
            return result[begin:end].unsqueeze(0)
        return result.new_empty(self.blocks, end - begin, result.shape[1])

    def start_sum(self, partial: torch.Tensor, result: torch.Tensor, begin: int, end: int) -> Transfer:
        """Sum over the ranks into rows begin to end of result, which are this rank's."""
        if self.blocks == 1:
            return start_all_reduce_(result[begin:end], self.group)
        return start_reduce_scatter_blocks(partial, result[begin:end], self.group)


def _layout(x: torch.Tensor, sequence_parallel: bool, group: Group, num_chunks: int) -> _Layout:
    num_rows = x.numel() // x.shape[-1]
    return _Layout(
        group, group_size(group) if sequence_parallel else 1, chunk_edges(num_rows, num_chunks, tile_steps(x, 1))
    )


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        up_weight: torch.Tensor,
        up_bias: torch.Tensor | None,
        down_weight: torch.Tensor,
        down_bias: torch.Tensor | None,
        activation: Activation,
        sequence_parallel: bool,
        group: Group,
        choice: ChunkChoice,
    ) -> torch.Tensor:
        num_chunks = choice.for_mlp(x, _multiply_adds(x, up_weight, down_weight, group, sequence_parallel), group, 1)
        layout = _layout(x, sequence_parallel, group, num_chunks)
        rows = rows_of(x)
        # The bias rides in the product of the first rank: no pass over y of its own, and one rounding less.
        bias = down_bias if group_rank(group) == 0 else None
        h = x.new_empty(layout.blocks, rows.shape[0], up_weight.shape[0])
        y = x.new_empty(rows.shape[0], down_weight.shape[0])
        transfers = []
        for (begin, end), gather in zip(layout.edges, layout.gather(rows), strict=True):
            chunk, partial = gather.wait(), layout.partial(y, begin, end)
            for block in range(layout.blocks):
                h_chunk = product_into(chunk[block], up_weight, None, h[block, begin:end])
                product_into(activation.forward(h_chunk, up_bias), down_weight, bias, partial[block])
            transfers.append(layout.start_sum(partial, y, begin, end))
        ctx.save_for_backward(x, up_weight, up_bias, down_weight, h)
        ctx.rest = activation, sequence_parallel, group, choice
        ctx.main_grads = getattr(up_weight, "main_grad", None), getattr(down_weight, "main_grad", None)
        ctx.down_bias_dtype = None if down_bias is None else down_bias.dtype
        return Transfers(transfers, y.view(*x.shape[:-1], y.shape[1])).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, up_weight, up_bias, down_weight, h = ctx.saved_tensors
        needs_dx, needs_up, needs_up_bias, needs_down, needs_down_bias, *_ = ctx.needs_input_grad
        activation, sequence_parallel, group, choice = ctx.rest
        multiply_adds = _multiply_adds(x, up_weight, down_weight, group, sequence_parallel)
        num_chunks = choice.for_mlp(x, multiply_adds, group, 2 if needs_up and needs_down else 1)
        layout = _layout(x, sequence_parallel, group, num_chunks)
        sharded = layout.blocks > 1
        dy_rows = rows_of(dy).contiguous()
        gathers = layout.gather(dy_rows)
        full_x = start_all_gather(rows_of(x), 0, group if sharded and needs_up else None)
        dh, dx = torch.empty_like(h), x.new_empty(rows_of(x).shape)
        # Of all blocks in their order, for the weight gradient.
        full_dy = dy_rows.new_empty(layout.blocks, *dy_rows.shape) if sharded else dy_rows.unsqueeze(0)
        bias = None if up_bias is None else up_bias.float()  # so that the parts of its gradient are float32
        dbias = torch.zeros_like(bias) if bias is not None and needs_up_bias else None
        transfers = []
        for (begin, end), gather in zip(layout.edges, gathers, strict=True):
            dy_chunk, partial = gather.wait(), layout.partial(dx, begin, end)
            if sharded:
                full_dy[:, begin:end] = dy_chunk
            for block in range(layout.blocks):
                da = dy_chunk[block] @ down_weight
                dh_chunk, part = activation.backward(da, h[block, begin:end], bias, True, needs_up_bias)
                dh[block, begin:end] = dh_chunk
                if dbias is not None:
                    dbias += part
                if needs_dx:
                    product_into(dh_chunk, up_weight.t(), None, partial[block])
            if needs_dx:
                transfers.append(layout.start_sum(partial, dx, begin, end))
        dup = ddown = None
        up_main_grad, down_main_grad = ctx.main_grads
        if needs_down:  # the activation again: as much traffic as to assemble its chunks, and it need not be kept
            a = activation.forward(rows_of(h), up_bias)
            ddown = weight_gradient(rows_of(full_dy), a, down_main_grad)
        if needs_up:
            dup = weight_gradient(rows_of(dh), full_x.wait(), up_main_grad)
        ddown_bias = rows_of(full_dy).sum(0) if needs_down_bias else None
        dx = Transfers(transfers, dx.view(x.shape)).wait() if needs_dx else None
        return dx, dup, None if dbias is None else dbias.to(up_bias.dtype), ddown, ddown_bias, None, None, None, None


def _multiply_adds(
    x: torch.Tensor, up_weight: torch.Tensor, down_weight: torch.Tensor, group: Group, sequence_parallel: bool
) -> int:
    num_rows = x.numel() // x.shape[-1] * (group_size(group) if sequence_parallel else 1)
    return num_rows * (up_weight.numel() + down_weight.numel())


def mlp(
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    activation: Activation,
    sequence_parallel: bool,
    group: Group,
    choice: ChunkChoice,
) -> torch.Tensor:
    """Down product of the activation of the up product. Inputs are not checked.

    x              [S, B, H] replicated, or under sequence parallelism this rank's block [S / R, B, H]
    up_weight      [F' / R, H],  up_bias [F' / R],  down_weight [H, F / R],  down_bias [H] replicated
    forward        h [S, B, F' / R] = all_gather(x) @ up.T;  a = activation(h, up_bias) [S, B, F / R]
                   y = all_reduce or reduce_scatter(a @ down.T) + down_bias
    backward       da = all_gather(dy) @ down;  dh = activation's gradient;  dx = all_reduce or reduce_scatter(dh @ up)

    Args:
        sequence_parallel: over the first dim of x.
        choice: into how many chunks of rows forward and backward are cut; see ChunkChoice.

    Communication: as column_linear and row_linear together, each collective under all of the products on its way.
    Memory: x, h and the weights are saved; the activation a is computed again in backward.
    Numerics: outputs and gradients are those of the two layers to the last bit, where the library's products of some
        rows are, except for the gradient of up_bias, which is summed chunk by chunk.
    """
    return _MLP.apply(x, up_weight, up_bias, down_weight, down_bias, activation, sequence_parallel, group, choice)

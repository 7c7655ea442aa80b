"""Both products of a tensor-parallel MLP as one function whose collectives hide under all of them.

Layer by layer, only the second product can hide the collective of the forward, and only the first layer's weight
gradient what is left of the backward's. Here chunks of rows go through both products, so that forward hides its
collectives under two products and backward under four:

    forward   for each chunk: up product, activation, down product; start the chunk's sum over the ranks
    backward  for each chunk: dy @ down, activation's gradient, @ up; start the chunk's sum over the ranks
              then both weight gradients; then wait
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.collectives.groups import Group, group_size
from fused_megatron.collectives.transfers import (
    Transfer,
    start_all_gather_blocks,
    start_all_reduce_,
    start_reduce_scatter_blocks,
)
from fused_megatron.ops.autograd_function import AutogradFunction
from fused_megatron.ops.product import product
from fused_megatron.overlap.chunk_choice import ChunkChoice
from fused_megatron.overlap.chunks import chunk_edges, tile_steps
from fused_megatron.overlap.overlapped_linear import of_first_rank, rows_of
from fused_megatron.overlap.weight_gradients import GradientDestination


class Activation(NamedTuple):
    """What is between the products, row by row, as raw functions without autograd.

    Attributes:
        forward: (h [T, F'], bias [F'] or None) -> a [T, F].
        backward: (da, h, bias, need_dh, need_dbias) -> (dh [T, F'], dbias [F']).
    """

    forward: Callable[..., torch.Tensor]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor]]


class _Chunks:
    """Rows [n, ..] of this rank, cut; with a sharded sequence every chunk holds the same rows of all ranks' blocks.

    In a full tensor the chunks stand one after the other, so that a collective or product takes one without a copy.
    """

    def __init__(self, x: torch.Tensor, ranks: int, group: Group, num_chunks: int) -> None:
        self.ranks, self.group = ranks, group
        self.edges = chunk_edges(x.numel() // x.shape[-1], num_chunks, tile_steps(x, 1))

    def of(self, full: torch.Tensor) -> list[torch.Tensor]:
        """The chunks of a full tensor."""
        return [full[self.ranks * begin : self.ranks * end] for begin, end in self.edges]

    def new_full(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """Memory for rows of all ranks; x [.., I] are this rank's."""
        return x.new_empty(self.ranks * (x.numel() // x.shape[-1]), width)

    def start_gather(self, rows: torch.Tensor, group: Group) -> tuple[torch.Tensor, list[Transfer]]:
        """The full tensor of rows and what fills it, chunk by chunk."""
        if self.ranks == 1:
            return rows, [Transfer((), (rows[begin:end],)) for begin, end in self.edges]
        full = self.new_full(rows, rows.shape[1])
        pairs = zip(self.edges, self.of(full), strict=True)
        return full, [start_all_gather_blocks(rows[begin:end], chunk, group) for (begin, end), chunk in pairs]

    def start_sums(self, full: torch.Tensor, rows: torch.Tensor, index: int) -> Transfer:
        """Sum chunk number index of a full tensor over the ranks, into this rank's rows (the same memory for one)."""
        begin, end = self.edges[index]
        if self.ranks == 1:
            return start_all_reduce_(rows[begin:end], self.group)
        return start_reduce_scatter_blocks(self.of(full)[index], rows[begin:end], self.group)


class MLPFunction(AutogradFunction):
    """Down product of the activation of the up product; see tensor_parallel.parallel_mlp.

    x              [S, B, H] replicated, or under sequence parallelism this rank's block [S / R, B, H] of the first dim
    up_weight      [F' / R, H],  up_bias [F' / R],  down_weight [H, F / R],  down_bias [H] replicated
    forward        h [S, B, F' / R] = all_gather(x) @ up.T;  a = activation(h, up_bias) [S, B, F / R]
                   y = all_reduce or reduce_scatter(a @ down.T) + down_bias
    backward       da = all_gather(dy) @ down;  dh = activation's gradient;  dx = all_reduce or reduce_scatter(dh @ up)

    Inputs are not checked. x, h and the weights are saved; the activation a is computed again in backward.
    """

    op = "tensor_parallel.parallel_mlp"

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
        ranks = group_size(group) if sequence_parallel else 1
        num_chunks = choice.for_mlp(x, ranks, up_weight.numel() + down_weight.numel(), group)
        chunks, backward_chunks = (_Chunks(x, ranks, group, number) for number in num_chunks)
        _, gathers = chunks.start_gather(rows_of(x).contiguous(), group)
        bias = of_first_rank(down_bias, group)
        h, partial = chunks.new_full(x, up_weight.shape[0]), chunks.new_full(x, down_weight.shape[0])
        y = partial if ranks == 1 else x.new_empty(rows_of(x).shape[0], down_weight.shape[0])
        transfers = []
        pieces = zip(gathers, chunks.of(h), chunks.of(partial), strict=True)
        for i, (gather, h_chunk, y_chunk) in enumerate(pieces):
            product(gather.wait(), up_weight, out=h_chunk)
            product(activation.forward(h_chunk, up_bias), down_weight, bias, out=y_chunk)
            transfers.append(chunks.start_sums(partial, y, i))
        ctx.save_for_backward(x, up_weight, up_bias, down_weight, h)
        ctx.rest = activation, backward_chunks, group
        ctx.destinations = GradientDestination(up_weight), GradientDestination(down_weight)
        return Transfer(transfers, (y.view(*x.shape[:-1], y.shape[1]),)).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, up_weight, up_bias, down_weight, h = ctx.saved_tensors
        needs_dx, needs_up, needs_up_bias, needs_down, needs_down_bias, *_ = ctx.needs_input_grad
        activation, chunks, group = ctx.rest
        full_dy, gathers = chunks.start_gather(rows_of(dy).contiguous(), group)
        full_x, x_gathers = chunks.start_gather(rows_of(x).contiguous(), group) if needs_up else (x, [])
        partial = chunks.new_full(x, x.shape[-1]) if needs_dx else None
        dx = partial if chunks.ranks == 1 or partial is None else x.new_empty(rows_of(x).shape)
        bias = None if up_bias is None else up_bias.float()  # so that the parts of its gradient are float32
        dbias = torch.zeros_like(bias) if bias is not None and needs_up_bias else None
        transfers = []
        dh = torch.empty_like(h) if len(gathers) > 1 else h
        for i, (gather, h_chunk, dh_chunk) in enumerate(zip(gathers, chunks.of(h), chunks.of(dh), strict=True)):
            da = product(gather.wait(), down_weight.t())
            gradient, part = activation.backward(da, h_chunk, bias, True, needs_up_bias)
            if dh is h:  # one chunk is all
                dh = gradient
            else:
                dh_chunk.copy_(gradient)
            if dbias is not None:
                dbias += part
            if partial is not None and dx is not None:
                product(gradient, up_weight.t(), out=chunks.of(partial)[i])
                transfers.append(chunks.start_sums(partial, dx, i))
        dup = ddown = None
        up_destination, down_destination = ctx.destinations
        if needs_down:  # the activation again: as much traffic as to assemble its chunks, and it need not be kept
            ddown = down_destination.add(lambda: (full_dy, activation.forward(h, up_bias)))
        for gather in x_gathers:
            gather.wait()
        if needs_up:
            dup = up_destination.add(lambda: (dh, full_x))
        ddown_bias = full_dy.sum(0) if needs_down_bias else None
        if dx is not None:
            dx = Transfer(transfers, (dx.view(x.shape),)).wait()
        return dx, dup, None if dbias is None else dbias.to(up_bias.dtype), ddown, ddown_bias, None, None, None, None

"""Tensor-parallel MLP as one autograd function whose collectives hide under the products of both layers.

Layer by layer, the forward's collective can hide under the product of the second layer only, and the rest of the
backward's collective under the weight gradient of the first layer only. Here each chunk of rows goes through both
layers, so that the forward hides its collectives under two products and the backward under four:

    forward   for each chunk: expansion, activation, projection; start the chunk's sum over the ranks
    backward  for each chunk: dy @ projection, gradient of the activation, dh @ expansion; start the chunk's sum
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
    """Activation of an MLP, applied row by row: a forward and a backward without autograd.

    Attributes:
        forward: (h [T, F'], bias [F'] or None) -> a [T, F].
        backward: (da, h, bias, need_dh, need_dbias) -> (dh [T, F'], dbias [F']).
    """

    forward: Callable[..., torch.Tensor]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor]]


class _Chunks:
    """Chunks of the rows of this rank, or, if the sequence is sharded, of all ranks.

    A full tensor holds the rows of all ranks in the order of the chunks: first the first chunk of every rank, and so
    on. Each chunk is contiguous there, so that a collective or a product takes it without a copy.
    """

    def __init__(self, x: torch.Tensor, ranks: int, group: Group, num_chunks: int) -> None:
        self.ranks, self.group = ranks, group
        self.edges = chunk_edges(x.numel() // x.shape[-1], num_chunks, tile_steps(x, 1))

    def of(self, full: torch.Tensor) -> list[torch.Tensor]:
        """Return the chunks of a full tensor, as views."""
        return [full[self.ranks * begin : self.ranks * end] for begin, end in self.edges]

    def new_full(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """Return memory for a full tensor [rows of all ranks, width]; x [.., I] has this rank's rows."""
        return x.new_empty(self.ranks * (x.numel() // x.shape[-1]), width)

    def start_gather(self, rows: torch.Tensor, group: Group) -> tuple[torch.Tensor, list[Transfer]]:
        """Start to gather this rank's rows; return the full tensor and one transfer for each chunk."""
        if self.ranks == 1:
            return rows, [Transfer((), (rows[begin:end],)) for begin, end in self.edges]
        full = self.new_full(rows, rows.shape[1])
        pairs = zip(self.edges, self.of(full), strict=True)
        return full, [start_all_gather_blocks(rows[begin:end], chunk, group) for (begin, end), chunk in pairs]

    def start_sums(self, full: torch.Tensor, rows: torch.Tensor, index: int) -> Transfer:
        """Start to sum chunk `index` of a full tensor over the ranks, into this rank's rows.

        Without a sharded sequence the full tensor and the rows are the same memory.
        """
        begin, end = self.edges[index]
        if self.ranks == 1:
            return start_all_reduce_(rows[begin:end], self.group)
        return start_reduce_scatter_blocks(self.of(full)[index], rows[begin:end], self.group)


class MLPFunction(AutogradFunction):
    """Projection of the activation of the expansion; see tensor_parallel.parallel_mlp.

    x           [S, B, H] replicated, or under sequence parallelism this rank's block [S / R, B, H] of the first dim
    expansion   weight [F' / R, H], bias [F' / R];  F' is 2 F for gated activations
    projection  weight [H, F / R], bias [H] replicated
    forward     h [S, B, F' / R] = all_gather(x) @ expansion.T;  a [S, B, F / R] = activation(h, expansion_bias)
                y = all_reduce or reduce_scatter(a @ projection.T) + projection_bias
    backward    da = all_gather(dy) @ projection;  dh = gradient of the activation
                dx = all_reduce or reduce_scatter(dh @ expansion)

    Inputs are not checked. x, h and the weights are saved; the activation a is computed again in backward.
    """

    op = "tensor_parallel.parallel_mlp"

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        expansion_weight: torch.Tensor,
        expansion_bias: torch.Tensor | None,
        projection_weight: torch.Tensor,
        projection_bias: torch.Tensor | None,
        activation: Activation,
        sequence_parallel: bool,
        group: Group,
        choice: ChunkChoice,
    ) -> torch.Tensor:
        ranks = group_size(group) if sequence_parallel else 1
        num_chunks = choice.for_mlp(x, ranks, expansion_weight.numel() + projection_weight.numel(), group)
        chunks, backward_chunks = (_Chunks(x, ranks, group, number) for number in num_chunks)
        _, gathers = chunks.start_gather(rows_of(x).contiguous(), group)
        bias = of_first_rank(projection_bias, group)
        h, partial = chunks.new_full(x, expansion_weight.shape[0]), chunks.new_full(x, projection_weight.shape[0])
        y = partial if ranks == 1 else x.new_empty(rows_of(x).shape[0], projection_weight.shape[0])
        transfers = []
        pieces = zip(gathers, chunks.of(h), chunks.of(partial), strict=True)
        for i, (gather, h_chunk, y_chunk) in enumerate(pieces):
            product(gather.wait(), expansion_weight, out=h_chunk)
            product(activation.forward(h_chunk, expansion_bias), projection_weight, bias, out=y_chunk)
            transfers.append(chunks.start_sums(partial, y, i))
        ctx.save_for_backward(x, expansion_weight, expansion_bias, projection_weight, h)
        ctx.rest = activation, backward_chunks, group
        ctx.destinations = GradientDestination(expansion_weight), GradientDestination(projection_weight)
        return Transfer(transfers, (y.view(*x.shape[:-1], y.shape[1]),)).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, expansion_weight, expansion_bias, projection_weight, h = ctx.saved_tensors
        needs_dx, needs_expansion, needs_expansion_bias, needs_projection, needs_projection_bias, *_ = (
            ctx.needs_input_grad
        )
        activation, chunks, group = ctx.rest
        full_dy, gathers = chunks.start_gather(rows_of(dy).contiguous(), group)
        full_x, x_gathers = chunks.start_gather(rows_of(x).contiguous(), group) if needs_expansion else (x, [])
        partial = chunks.new_full(x, x.shape[-1]) if needs_dx else None
        dx = partial if chunks.ranks == 1 or partial is None else x.new_empty(rows_of(x).shape)
        # The gradient of the bias is summed chunk by chunk, in float32.
        bias = None if expansion_bias is None else expansion_bias.float()
        dbias = torch.zeros_like(bias) if bias is not None and needs_expansion_bias else None
        transfers = []
        dh = torch.empty_like(h) if len(gathers) > 1 else h
        for i, (gather, h_chunk, dh_chunk) in enumerate(zip(gathers, chunks.of(h), chunks.of(dh), strict=True)):
            da = product(gather.wait(), projection_weight.t())
            gradient, part = activation.backward(da, h_chunk, bias, True, needs_expansion_bias)
            if dh is h:  # there is one chunk only
                dh = gradient
            else:
                dh_chunk.copy_(gradient)
            if dbias is not None:
                dbias += part
            if partial is not None and dx is not None:
                product(gradient, expansion_weight.t(), out=chunks.of(partial)[i])
                transfers.append(chunks.start_sums(partial, dx, i))
        dexpansion = dprojection = None
        expansion_destination, projection_destination = ctx.destinations
        if needs_projection:
            # To compute the activation again costs as much traffic as to assemble its chunks, and no memory until then.
            dprojection = projection_destination.add(lambda: (full_dy, activation.forward(h, expansion_bias)))
        for gather in x_gathers:
            gather.wait()
        if needs_expansion:
            dexpansion = expansion_destination.add(lambda: (dh, full_x))
        dprojection_bias = full_dy.sum(0) if needs_projection_bias else None
        if dx is not None:
            dx = Transfer(transfers, (dx.view(x.shape),)).wait()
        dexpansion_bias = None if dbias is None else dbias.to(expansion_bias.dtype)
        return dx, dexpansion, dexpansion_bias, dprojection, dprojection_bias, None, None, None, None

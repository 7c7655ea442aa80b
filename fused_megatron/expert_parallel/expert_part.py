"""A part of a rank's experts: their products with the rows of a table, forward and backward, without autograd."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from fused_megatron.expert_parallel.token_order import TableOrder, weights_of_pairs
from fused_megatron.expert_parallel.weighted_activation import WeightedActivation
from fused_megatron.ops.expert_permutation import combine_tokens
from fused_megatron.ops.grouped_product import Counts, grouped_product


@dataclass(frozen=True)
class ExpertShapes:
    """Number and kind of the experts of this rank.

    Attributes:
        num_experts: number of them.
        activation: their activation.
        adds_bias: whether this rank adds the bias of the projection to its part of the sum (one rank of etp_group).
    """

    num_experts: int
    activation: WeightedActivation
    adds_bias: bool = True


class Parameters(NamedTuple):
    """Weights and biases of experts, or their gradients.

    Attributes:
        expansion: [experts, F', H]; expansion_bias: [experts, F'] or None.
        projection: [experts, H, F]; projection_bias: [experts, H] or None.
    """

    expansion: torch.Tensor
    expansion_bias: torch.Tensor | None
    projection: torch.Tensor
    projection_bias: torch.Tensor | None


class Block(NamedTuple):
    """Sorted rows of some experts, whose products run at once.

    Attributes:
        experts: these experts, among all of the rank.
        rows: their sorted rows.
        counts: number of rows of each of them.
        tokens, weight, h: as in Part, of these rows.
    """

    experts: slice
    rows: slice
    counts: Counts
    tokens: torch.Tensor
    weight: torch.Tensor
    h: torch.Tensor

    def of_rows(self, by_expert: torch.Tensor) -> torch.Tensor:
        """Return the value [N, O] of each row's expert, for values [experts, O]; [1, O] if there is one expert."""
        own = by_expert[self.experts]
        if own.shape[0] == 1:
            return own
        return own.repeat_interleave(_on_device(self.counts, own.device), dim=0, output_size=self.tokens.shape[0])


class GradientSink(Protocol):
    """Receiver of the parts of which gradients of parameters are made; see expert_gradients.py."""

    needs_inputs: bool

    def add_expansion(self, part: "Part", block: Block, dh: torch.Tensor) -> None:
        """Take the gradient dh [n, F'] of some rows of h."""

    def add_projection(self, block: Block, dy: torch.Tensor, a: torch.Tensor) -> None:
        """Take the gradient dy [n, H] of the results of some rows, and their activations a [n, F]."""

    def add_projection_bias(self, block: Block, dy: torch.Tensor) -> None:
        """Take the gradient dy [n, H] of the results of some rows, times the weights of the rows."""


class Part:
    """A part of the experts, with the rows of its table in the order of the experts.

    Attributes:
        order: order of the table.
        table: [n, H].
        h: [N, F'], the results of the expansion.
        tokens: [N], the row of the table of each sorted row.
        weight: [N] float32 (float64 for float64), the weight of each sorted row.
    """

    def __init__(
        self, order: TableOrder, table: torch.Tensor, weights: torch.Tensor, h: torch.Tensor, shapes: ExpertShapes
    ) -> None:
        self.order, self.table, self.h, self.shapes = order, table, h, shapes
        self.tokens = order.tokens()
        self.weight = order.weights(weights).to(torch.promote_types(table.dtype, torch.float32))

    def blocks(self) -> Iterator["Block"]:
        """Yield the blocks of the products that run at once: one expert on a CPU, else all of them."""
        first, counts = self.order.first, self.order.counts
        if isinstance(counts, torch.Tensor) or self.table.is_cuda:
            yield Block(slice(first, self.order.end), slice(None), counts, self.tokens, self.weight, self.h)
            return
        begin = 0
        views = zip(self.tokens.split(counts), self.weight.split(counts), self.h.split(counts), strict=True)
        for expert, (count, (tokens, weight, h)) in enumerate(zip(counts, views, strict=True), first):
            rows = slice(begin, begin + count)
            yield Block(slice(expert, expert + 1), rows, (count,), tokens, weight, h)
            begin += count

    def forward(self, parameters: Parameters) -> torch.Tensor:
        """Fill h, and return the sum over the experts of each row of the table, [n, H]."""
        expansion, expansion_bias, projection, projection_bias = parameters
        y = self.table.new_empty(self.tokens.shape[0], self.table.shape[1])
        for block in self.blocks():
            experts, rows, counts, tokens, weight, h = block
            if not tokens.shape[0]:
                continue
            out = y[rows]
            grouped_product(self.table.index_select(0, tokens), expansion[experts], counts, out=h)
            if expansion_bias is not None:
                h += block.of_rows(expansion_bias)
            grouped_product(self.shapes.activation.forward(h, weight), projection[experts], counts, out=out)
            if projection_bias is not None and self.shapes.adds_bias:
                out += (weight[:, None] * block.of_rows(projection_bias)).to(y.dtype)
        return combine_tokens(y, self.order.pairs)

    def backward(
        self, dy_table: torch.Tensor, parameters: Parameters, gradients: GradientSink
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the gradients of the parameters, and return the gradients of the table [n, H] and its weights [n, k]."""
        expansion, _, projection, projection_bias = parameters
        num_rows = self.tokens.shape[0]
        dx, dweight = dy_table.new_empty(num_rows, self.table.shape[1]), torch.empty_like(self.weight)
        for block in self.blocks():
            experts, rows, counts, tokens, weight, h = block
            dy = dy_table.index_select(0, tokens)
            da = grouped_product(dy, projection[experts], counts, transposed=True)
            dh, dweight_of_block, a = self.shapes.activation.backward(da, h, weight)
            if projection_bias is not None:
                if self.shapes.adds_bias:
                    dweight_of_block += (dy.to(weight.dtype) * block.of_rows(projection_bias)).sum(1)
                gradients.add_projection_bias(block, dy * weight[:, None])
            dweight[rows] = dweight_of_block
            gradients.add_projection(block, dy, a)
            gradients.add_expansion(self, block, dh)
            if gradients.needs_inputs:
                grouped_product(dh, expansion[experts], counts, transposed=True, out=dx[rows])
        if not gradients.needs_inputs:
            return dx[:0], dweight[:0]
        return combine_tokens(dx, self.order.pairs), weights_of_pairs(dweight, self.order.pairs.places)


def sum_of_rows(x: torch.Tensor, counts: Counts) -> torch.Tensor:
    """Return the sum [experts, O] of the rows [N, O] of each expert, in float32 (float64 for float64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if len(counts) == 1:
        return wide.sum(0, keepdim=True)
    return torch.segment_reduce(wide, "sum", lengths=_on_device(counts, x.device), axis=0, initial=0)


def _on_device(counts: Counts, device: torch.device) -> torch.Tensor:
    return counts if isinstance(counts, torch.Tensor) else torch.tensor(counts).to(device, non_blocking=True)

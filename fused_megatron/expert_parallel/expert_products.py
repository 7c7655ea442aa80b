"""Products of experts as one autograd function: expansion, activation times probability, projection, sum over experts.

The rows of a table are tokens that this rank has, or has received. Each expert takes the rows that chose it. On a CPU
one expert follows the other, so that its rows stay in the cache from the expansion to the projection; on a GPU each
product is one grouped product of all experts.
"""

from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.expert_parallel.expert_gradients import ParameterGradients
from fused_megatron.expert_parallel.expert_part import ExpertShapes, Parameters, Part
from fused_megatron.expert_parallel.token_order import TableOrder
from fused_megatron.ops.autograd_function import AutogradFunction
from fused_megatron.ops.expert_permutation import ExpertOrder
from fused_megatron.overlap.weight_gradients import GradientDestination


class TokenExchange(Protocol):
    """The way of tokens to the experts of this rank, and of the results back; see dispatch.py.

    The experts of a rank come in parts: the exchange of one part runs under the products of another.
    """

    num_parts: int

    def arrive(self, part: int, x: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the table [n, H] of a part and its weights [n, k], for the arguments of ExpertFunction."""

    def order(self, part: int) -> TableOrder:
        """Return the order of the table of a part; after arrive."""

    def leave(self, part: int, y: torch.Tensor) -> None:
        """Take the results [n, H] of a part."""

    def result(self, x: torch.Tensor) -> torch.Tensor:
        """Return the result of ExpertFunction, after the last part."""

    def arrive_back(self, part: int, dy: torch.Tensor) -> torch.Tensor:
        """Return the gradient [n, H] of the results of a part, for the gradient of the function's result."""

    def leave_back(self, part: int, dx: torch.Tensor, dweights: torch.Tensor) -> None:
        """Take the gradients of the table and of the weights of a part."""

    def gradients(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of the function's first two arguments, after the last part."""


class ExpertFunction(AutogradFunction):
    """Results of the experts of this rank for the rows of a table; see ExpertMLP.

    table       x [n, H], and weights [n, k] of the pairs of a row and an expert
    forward     h [N, F'] = rows of each expert @ expansion.T (+ bias);  a [N, F] = activation(h) * weight
                y [n, H] = sum over the experts of a row of a @ projection.T (+ weight * bias)
    backward    da = dy @ projection;  dh, dweight = gradients of the activation
                dx [n, H] = sum over the experts of a row of dh @ expansion

    Inputs are not checked. The table, h, the weights and the order are saved; rows in the order of the experts and
    activations are made again in backward.
    """

    op = "expert_parallel.ExpertMLP"

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: torch.Tensor | None,
        expansion_weight: torch.Tensor,
        expansion_bias: torch.Tensor | None,
        projection_weight: torch.Tensor,
        projection_bias: torch.Tensor | None,
        shapes: ExpertShapes,
        exchange: TokenExchange,
    ) -> torch.Tensor:
        stacked = expansion_weight, expansion_bias, projection_weight, projection_bias
        parameters = _by_expert(stacked, shapes)
        kept: list[torch.Tensor] = []
        for index in range(exchange.num_parts):
            table, table_weights = exchange.arrive(index, x, weights)
            order = exchange.order(index)
            h = table.new_empty(order.num_rows, expansion_weight.shape[0] // shapes.num_experts)
            part = Part(order, table, table_weights, h, shapes)
            exchange.leave(index, part.forward(parameters))
            kept += [table, table_weights, h, order.pairs.rows, order.pairs.places]
        ctx.save_for_backward(*stacked, *kept)
        ctx.orders = [exchange.order(index).without_pairs() for index in range(exchange.num_parts)]
        ctx.rest = shapes, exchange
        ctx.destinations = GradientDestination(expansion_weight), GradientDestination(projection_weight)
        return exchange.result(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        saved = ctx.saved_tensors
        stacked, kept = saved[:4], saved[4:]
        shapes, exchange = ctx.rest
        needs_x, needs_weights, *needs, _, _ = ctx.needs_input_grad
        needed = tuple(tensor if need else None for tensor, need in zip(stacked, needs, strict=True))
        gradients = ParameterGradients(needed, ctx.destinations, shapes.num_experts, needs_x or needs_weights)
        parameters = _by_expert(stacked, shapes)
        for index, order in enumerate(ctx.orders):
            table, table_weights, h, rows, places = kept[5 * index : 5 * index + 5]
            part = Part(order.with_pairs(ExpertOrder(rows, places, rows[:0])), table, table_weights, h, shapes)
            dy_table = exchange.arrive_back(index, dy)
            gradients.begin(part, dy_table)
            dx, dweights = part.backward(dy_table, parameters, gradients)
            if gradients.needs_inputs:
                exchange.leave_back(index, dx, dweights)
        of_inputs = exchange.gradients(dy) if gradients.needs_inputs else (None, None)
        return *of_inputs, *gradients.results(), None, None


def _by_expert(stacked: tuple[torch.Tensor | None, ...], shapes: ExpertShapes) -> Parameters:
    return Parameters(*(None if x is None else x.unflatten(0, (shapes.num_experts, -1)) for x in stacked))  # type: ignore[arg-type]

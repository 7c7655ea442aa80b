"""Gradients of the parameters of experts: computed at once or deferred, and returned or added to main_grad."""

from collections.abc import Callable

import torch

from fused_megatron.expert_parallel.expert_part import Block, Part, sum_of_rows
from fused_megatron.ops.grouped_product import grouped_weight_gradient
from fused_megatron.overlap.weight_gradients import GradientDestination

MainGrad = Callable[[], torch.Tensor] | None


class StackedGradient:
    """Gradient of a parameter that stacks experts: added to its main_grad, or in a new tensor.

    Args:
        like: the parameter.
        num_experts: number of experts that it stacks.
        main_grad: as in the record of the parameter.
    """

    def __init__(self, like: torch.Tensor, num_experts: int, main_grad: MainGrad = None) -> None:
        self._adds = main_grad is not None
        self._total = torch.empty_like(like) if main_grad is None else main_grad()
        self._by_expert = self._total.unflatten(0, (num_experts, -1))

    def add_product(self, block: Block, dy: torch.Tensor, x: torch.Tensor) -> None:
        """Add dy [N, O].T @ x [N, I] of each expert, once for every expert."""
        into = self._by_expert[block.experts]
        if dy.device.type == "cpu" and dy.dtype != into.dtype:  # on a CPU, products of bfloat16 round to bfloat16
            dy, x = dy.float(), x.float()
        grouped_weight_gradient(dy, x, block.counts, into, self._adds)

    def set_sum(self, block: Block, dy: torch.Tensor) -> None:
        """Set the sum of the rows dy [N, O] of each expert, the gradient of a bias; once for every expert."""
        self._by_expert[block.experts] = sum_of_rows(dy, block.counts).to(self._total.dtype)

    @property
    def result(self) -> torch.Tensor | None:
        """The gradient for autograd; None if it was added to main_grad."""
        return None if self._adds else self._total


class ParameterGradients:
    """Gradients of the weights and biases of the experts of a rank, from the parts of a backward.

    A deferred weight gradient keeps dh [N, F'] or the gradient of the results, and computes the activations again.

    Args:
        parameters: weight and bias of the expansion, weight and bias of the projection; None where nothing needs the
            gradient.
        destinations: of the two weights.
        num_experts: number of experts that a parameter stacks.
        needs_inputs: whether the gradients of the table and of the weights of its rows are needed.
    """

    def __init__(
        self,
        parameters: tuple[torch.Tensor | None, ...],
        destinations: tuple[GradientDestination, GradientDestination],
        num_experts: int,
        needs_inputs: bool,
    ) -> None:
        self.needs_inputs = needs_inputs
        self._num_experts = num_experts
        self._weights = parameters[0], parameters[2]
        self._destinations = destinations
        self._parts: list[tuple[Part, torch.Tensor]] = []
        self._dh: dict[int, torch.Tensor] = {}
        self._expansion, self._projection = (
            StackedGradient(weight, num_experts, destination.main_grad)
            if weight is not None and not destination.later
            else None
            for weight, destination in zip(self._weights, destinations, strict=True)
        )
        self._expansion_bias, self._projection_bias = (
            None if bias is None else StackedGradient(bias, num_experts) for bias in (parameters[1], parameters[3])
        )

    def begin(self, part: Part, dy_table: torch.Tensor) -> None:
        """Begin the backward of a part, with the gradient [n, H] of its results."""
        self._parts.append((part, dy_table))

    def add_expansion(self, part: Part, block: Block, dh: torch.Tensor) -> None:
        """Take the gradient dh [n, F'] of some rows of h."""
        if self._expansion_bias is not None:
            self._expansion_bias.set_sum(block, dh)
        if self._expansion is not None:
            self._expansion.add_product(block, dh, part.table.index_select(0, block.tokens))
        elif self._weights[0] is not None:
            kept = self._dh.setdefault(id(part), torch.empty_like(part.h))
            kept[block.rows] = dh

    def add_projection(self, block: Block, dy: torch.Tensor, a: torch.Tensor) -> None:
        """Take the gradient dy [n, H] of the results of some rows, and their activations a [n, F]."""
        if self._projection is not None:
            self._projection.add_product(block, dy, a)

    def add_projection_bias(self, block: Block, dy: torch.Tensor) -> None:
        """Take the gradient dy [n, H] of the results of some rows, times the weights of the rows."""
        if self._projection_bias is not None:
            self._projection_bias.set_sum(block, dy)

    def results(self) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients for autograd: weight and bias of the expansion, weight and bias of the projection."""
        found: list[torch.Tensor | None] = []
        for weight, eager, bias, destination, compute in zip(
            self._weights,
            (self._expansion, self._projection),
            (self._expansion_bias, self._projection_bias),
            self._destinations,
            (self._deferred_expansion, self._deferred_projection),
            strict=True,
        ):
            if weight is not None and eager is None:
                found.append(destination.fill(compute))
            else:
                found.append(None if eager is None else eager.result)
            found.append(None if bias is None else bias.result)
        return tuple(found)

    def _deferred_expansion(self, main_grad: MainGrad) -> torch.Tensor | None:
        assert self._weights[0] is not None
        gradient = StackedGradient(self._weights[0], self._num_experts, main_grad)
        for part, _ in self._parts:
            dh = self._dh.pop(id(part))
            for block in part.blocks():
                gradient.add_product(block, dh[block.rows], part.table.index_select(0, block.tokens))
        return gradient.result

    def _deferred_projection(self, main_grad: MainGrad) -> torch.Tensor | None:
        assert self._weights[1] is not None
        gradient = StackedGradient(self._weights[1], self._num_experts, main_grad)
        for part, dy_table in self._parts:
            for block in part.blocks():
                a = part.shapes.activation.forward(block.h, block.weight)
                gradient.add_product(block, dy_table.index_select(0, block.tokens), a)
        return gradient.result

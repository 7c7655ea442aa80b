"""Forward and backward of one stage, one microbatch at a time. Knows no other rank."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fused_megatron.sharding import DeferredWeightGradients


class _Kept(NamedTuple):
    """What is kept of a forward, besides what autograd keeps: no output."""

    inputs: tuple[torch.Tensor, ...]  # that need a gradient
    edges: tuple[GradientEdge, ...]  # of the outputs that need a gradient


class StageCompute:
    """A stage's module and its microbatches under way.

    Args:
        module: what the stage computes.
        deferred: the store of this rank's weight gradients, which the parameters' records name.
        loss_fn: of the last stage: (its output, target) -> what it returns.

    Memory: of an output only its place in the graph is kept, so that it is freed when all others have let go of it.
    """

    def __init__(
        self,
        module: nn.Module,
        deferred: DeferredWeightGradients,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    ) -> None:
        self.module = module
        self._deferred = deferred
        self._loss_fn = loss_fn
        self._kept: dict[int, _Kept] = {}
        self._products: dict[int, list[Callable[[], None]]] = {}

    @property
    def num_live(self) -> int:
        """Microbatches between forward and the end of their backward."""
        return len({*self._kept, *self._products})

    def forward(
        self, microbatch: int, inputs: tuple[torch.Tensor, ...], kwargs: Mapping[str, Any], target: Any = None
    ) -> tuple[torch.Tensor, ...]:
        """The outputs; of the last stage only their loss. Under no_grad nothing is kept.

        Raises:
            TypeError: outputs that are not tensors.
        """
        output = self.module(*inputs, **kwargs)
        if self._loss_fn is not None:
            output = self._loss_fn(output, target)
        outputs = output if isinstance(output, tuple) else (output,)
        for tensor in outputs:
            if not isinstance(tensor, torch.Tensor):
                given = type(tensor).__name__
                raise TypeError(f"a stage returned {given}: it must return a tensor or a tuple of tensors")
        if torch.is_grad_enabled():
            edges = tuple(get_gradient_edge(tensor) for tensor in outputs if tensor.requires_grad)
            self._kept[microbatch] = _Kept(tuple(x for x in inputs if x.requires_grad), edges)
        return outputs

    def backward(self, microbatch: int, gradients: Sequence[torch.Tensor], split: bool) -> list[torch.Tensor]:
        """Backward of a microbatch; with split the weights that can wait for weight_grad().

        Args:
            gradients: of the outputs that need one, in order.

        Returns:
            The gradients of the inputs that need one, in order; zeros for one that was not used.
        """
        inputs, edges = self._kept.pop(microbatch)
        products: list[Callable[[], None]] = []
        assert len(edges) == len(gradients)
        with self._deferred.collecting(products) if split else nullcontext():
            if edges:
                torch.autograd.backward(edges, list(gradients))
        if split:
            self._products[microbatch] = products
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]

    def weight_grad(self, microbatch: int) -> None:
        """What a split backward left."""
        products = self._products.pop(microbatch)
        while products:  # what a product needed is freed before the next one
            products.pop(0)()

    def clear(self) -> None:
        """Forget all microbatches, after a fault."""
        self._kept.clear()
        self._products.clear()

"""Forward and backward of one stage, one microbatch at a time. Knows no other rank."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fused_megatron.checks import InputError, check
from fused_megatron.modules.auxiliary_loss import split_auxiliary_loss
from fused_megatron.sharding import DeferredWeightGradients


def first_gradient(loss: torch.Tensor, loss_divisor: float) -> torch.Tensor:
    """The gradient with which the backward of a microbatch begins.

    Gradients are divided here and nowhere else: microbatches, stages and data-parallel ranks only add theirs up.
    """
    return torch.ones_like(loss) / loss_divisor


class _Kept(NamedTuple):
    """What is kept of a forward, besides what autograd keeps: no output."""

    inputs: tuple[torch.Tensor, ...]  # that need a gradient
    edges: tuple[GradientEdge, ...]  # of the outputs that need a gradient
    auxiliary: GradientEdge | None  # of the auxiliary loss of a stage that is not the last


class StageCompute:
    """A stage's module and its microbatches under way.

    Args:
        module: what the stage computes.
        deferred: the store of this rank's weight gradients, which the parameters' records name.
        loss_fn: of the last stage: (its output, target) -> what it returns.
        auxiliary_losses: whether the module may return WithAuxiliaryLoss.

    Attributes:
        auxiliary_losses: of the step, by microbatch; the last stage's are in its loss.

    Memory: of an output only its place in the graph is kept, so that it is freed when all others have let go of it.
    """

    def __init__(
        self,
        module: nn.Module,
        deferred: DeferredWeightGradients,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
        auxiliary_losses: bool = False,
    ) -> None:
        self.module = module
        self._deferred = deferred
        self._loss_fn = loss_fn
        self._auxiliary = auxiliary_losses
        self.auxiliary_losses: dict[int, torch.Tensor] = {}
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

        An auxiliary loss is added to the loss, or kept for backward; under no_grad, in an evaluation, it is left out.

        Raises:
            InputError: a stage that changes its input in place.
            TypeError: outputs that are not tensors.
        """
        try:
            output, auxiliary = split_auxiliary_loss(self.module(*inputs, **kwargs))
        except RuntimeError as error:
            if "leaf Variable that requires grad" not in str(error):
                raise
            raise InputError(
                "a stage changes its input in place, which autograd allows of no leaf, and the input of a stage is one "
                "(clone it, or make the first op of the stage one that is not in place: inplace=False)"
            ) from error
        if not torch.is_grad_enabled():
            auxiliary = None
        check(
            auxiliary is None or self._auxiliary,
            "a stage returned an auxiliary loss: make the PipelineExecutor with auxiliary_losses=True, on every rank",
        )
        if self._loss_fn is not None:
            output = self._loss_fn(output, target)
            if auxiliary is not None:
                output, auxiliary = output + auxiliary, None
        outputs = output if isinstance(output, tuple) else (output,)
        for tensor in outputs:
            if not isinstance(tensor, torch.Tensor):
                given = type(tensor).__name__
                raise TypeError(f"a stage returned {given}: it must return a tensor or a tuple of tensors")
        if torch.is_grad_enabled():
            edges = tuple(get_gradient_edge(tensor) for tensor in outputs if tensor.requires_grad)
            edge = None if auxiliary is None or not auxiliary.requires_grad else get_gradient_edge(auxiliary)
            self._kept[microbatch] = _Kept(tuple(x for x in inputs if x.requires_grad), edges, edge)
            if auxiliary is not None:
                self.auxiliary_losses[microbatch] = auxiliary.detach().clone()
        return outputs

    def backward(
        self, microbatch: int, gradients: Sequence[torch.Tensor | None], split: bool, loss_divisor: float
    ) -> list[torch.Tensor | None]:
        """Backward of a microbatch; with split the weights that can wait for weight_grad().

        Args:
            gradients: of the outputs that need one, in order; None for one that the next stage did not use. That of
                the loss counts for nothing where the loss is a constant (a microbatch without targets).
            loss_divisor: of the step, and so of an auxiliary loss.

        Returns:
            The gradients of the inputs that need one, in order; None for one that was not used.
        """
        inputs, edges, auxiliary = self._kept.pop(microbatch)
        products: list[Callable[[], None]] = []
        if self._loss_fn is not None and not edges:
            gradients = ()
        given = [(edge, x) for edge, x in zip(edges, gradients, strict=True) if x is not None]
        if auxiliary is not None:
            given.append((auxiliary, first_gradient(self.auxiliary_losses[microbatch], loss_divisor)))
        with self._deferred.collecting(products) if split else nullcontext():
            if given:
                torch.autograd.backward([edge for edge, _ in given], [x for _, x in given])
        if split:
            self._products[microbatch] = products
        return [x.grad for x in inputs]

    def weight_grad(self, microbatch: int) -> None:
        """What a split backward left."""
        products = self._products.pop(microbatch)
        while products:  # what a product needed is freed before the next one
            products.pop(0)()

    def clear(self) -> None:
        """Forget all microbatches, after a fault."""
        self._kept.clear()
        self._products.clear()
        self.auxiliary_losses.clear()

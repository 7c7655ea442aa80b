"""Forward and backward of one stage, one microbatch at a time, without communication."""

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
    """Return the gradient with which the backward of a microbatch begins.

    Gradients are divided here and nowhere else. Microbatches, stages and data-parallel ranks only sum them.
    """
    return torch.ones_like(loss) / loss_divisor


class _SavedForward(NamedTuple):
    """State of a forward that backward needs, besides autograd's. It holds no output."""

    inputs: tuple[torch.Tensor, ...]  # only inputs that need a gradient
    edges: tuple[GradientEdge, ...]  # of the outputs that need a gradient
    auxiliary: GradientEdge | None  # of the auxiliary loss, if this is not the last stage


class StageCompute:
    """A stage's module and its microbatches under way.

    Args:
        module: the module of the stage.
        deferred: this rank's store of deferred weight gradients, which the records of the parameters refer to.
        loss_fn: for the last stage: (output of the module, target) -> loss.
        auxiliary_losses: whether the module may return WithAuxiliaryLoss.

    Attributes:
        auxiliary_losses: auxiliary losses of the step, by microbatch; on the last stage they are part of the loss.

    Memory: for an output only its edge in the graph is kept, so that its memory is free once no one else uses it.
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
        self._saved: dict[int, _SavedForward] = {}
        self._products: dict[int, list[Callable[[], None]]] = {}

    @property
    def num_live(self) -> int:
        """Number of microbatches between forward and the end of their backward."""
        return len({*self._saved, *self._products})

    def forward(
        self, microbatch: int, inputs: tuple[torch.Tensor, ...], kwargs: Mapping[str, Any], target: Any = None
    ) -> tuple[torch.Tensor, ...]:
        """Run the module; return its outputs, on the last stage only the loss. Under no_grad nothing is saved.

        An auxiliary loss is added to the loss, or saved for backward; under no_grad (evaluation) it is ignored.

        Raises:
            InputError: the stage changes its input in place.
            TypeError: an output is not a tensor.
        """
        try:
            output, auxiliary = split_auxiliary_loss(self.module(*inputs, **kwargs))
        except RuntimeError as error:
            if "leaf Variable that requires grad" not in str(error):
                raise
            raise InputError(
                "a stage changes its input in place, which autograd forbids, since the input of a stage is a leaf "
                "(clone it, or begin the stage with an op that is not in place: inplace=False)"
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
                found = type(tensor).__name__
                raise TypeError(f"a stage returned {found}: it must return a tensor or a tuple of tensors")
        if torch.is_grad_enabled():
            edges = tuple(get_gradient_edge(tensor) for tensor in outputs if tensor.requires_grad)
            edge = None if auxiliary is None or not auxiliary.requires_grad else get_gradient_edge(auxiliary)
            self._saved[microbatch] = _SavedForward(tuple(x for x in inputs if x.requires_grad), edges, edge)
            if auxiliary is not None:
                self.auxiliary_losses[microbatch] = auxiliary.detach().clone()
        return outputs

    def backward(
        self, microbatch: int, gradients: Sequence[torch.Tensor | None], split: bool, loss_divisor: float
    ) -> list[torch.Tensor | None]:
        """Run the backward of a microbatch; with split, weight gradients that can wait are left to weight_grad().

        Args:
            microbatch: its index.
            gradients: gradients of the outputs that need one, in order; None for outputs that the next stage did not
                use. Ignored for a loss that is a constant (a microbatch without targets).
            split: whether weight gradients are deferred.
            loss_divisor: divisor of the step, also for an auxiliary loss.

        Returns:
            The gradients of the inputs that need one, in order; None for an input that was not used.
        """
        inputs, edges, auxiliary = self._saved.pop(microbatch)
        products: list[Callable[[], None]] = []
        if self._loss_fn is not None and not edges:
            gradients = ()
        starts = [(edge, x) for edge, x in zip(edges, gradients, strict=True) if x is not None]
        if auxiliary is not None:
            starts.append((auxiliary, first_gradient(self.auxiliary_losses[microbatch], loss_divisor)))
        with self._deferred.collecting(products) if split else nullcontext():
            if starts:
                torch.autograd.backward([edge for edge, _ in starts], [x for _, x in starts])
        if split:
            self._products[microbatch] = products
        return [x.grad for x in inputs]

    def weight_grad(self, microbatch: int) -> None:
        """Compute the weight gradients that a split backward deferred."""
        products = self._products.pop(microbatch)
        while products:  # the operands of a product are freed before the next one
            products.pop(0)()

    def clear(self) -> None:
        """Forget all microbatches, after a fault."""
        self._saved.clear()
        self._products.clear()
        self.auxiliary_losses.clear()

"""The gradient of a weight: where it goes, and whether now or later."""

from collections.abc import Callable

import torch

from fused_megatron.ops.product import product
from fused_megatron.sharding import parameter_record

# The operands (dy [T, O], x [T, I]) of the product dy.T @ x [O, I].
Operands = Callable[[], tuple[torch.Tensor, torch.Tensor]]


class GradientDestination:
    """Where a weight's gradient goes, as its record says in the forward: its main_grad, its store of products."""

    def __init__(self, weight: torch.Tensor) -> None:
        record = parameter_record(weight)
        self.main_grad, self._deferred = record.main_grad, record.deferred
        self._parameter = None if self._deferred is None else weight  # a leaf: it holds no graph

    @property
    def later(self) -> bool:
        """Whether a backward now leaves the product for later."""
        return self._deferred is not None and self._deferred.open

    def add(self, operands: Operands) -> torch.Tensor | None:
        """The gradient for autograd to add; None where it went, or will go, its own way."""
        if self._deferred is None or not self.later:
            return weight_gradient(*operands(), self.main_grad)
        self._deferred.append(lambda: self._accumulate(operands))
        return None

    @torch.no_grad()  # as within backward; saved activations still say that they need a gradient
    def _accumulate(self, operands: Operands) -> None:
        """As autograd does at the end of a backward: the first gradient is taken, each other one added to it."""
        gradient, parameter = weight_gradient(*operands(), self.main_grad), self._parameter
        assert parameter is not None
        if gradient is not None and parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None and parameter.grad is not None:
            parameter.grad.add_(gradient)


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, main_grad: torch.Tensor | None) -> torch.Tensor | None:
    """dy [T, O], x [T, I]: dy.T @ x [O, I]; with a main_grad that is added to it, and the result is None.

    A parameter's main_grad is a float32 tensor of its shape (data_parallel.GradientBuckets sets it). The product then
    accumulates into it in float32: no gradient of the parameter's size is made, rounded or added.
    """
    if main_grad is None:
        return product(dy.t(), x.t())
    if not dy.is_cuda and dy.dtype != main_grad.dtype:  # the CPU's products of bfloat16 round their result to bfloat16
        dy, x = dy.float(), x.float()
    product(dy.t(), x.t(), out=main_grad, add=True)
    return None

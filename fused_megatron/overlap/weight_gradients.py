"""Gradient of a weight: computed at once or deferred, and returned to autograd or added to main_grad."""

from collections.abc import Callable

import torch

from fused_megatron.ops.product import product
from fused_megatron.sharding import parameter_record

# Returns the operands (dy [T, O], x [T, I]) of the product dy.T @ x [O, I].
Operands = Callable[[], tuple[torch.Tensor, torch.Tensor]]
# Adds a gradient to main_grad and returns None; without a main_grad returns the gradient.
Gradient = Callable[[Callable[[], torch.Tensor] | None], torch.Tensor | None]


class GradientDestination:
    """Destination of a weight's gradient, read from its record in forward: main_grad, store of deferred products."""

    def __init__(self, weight: torch.Tensor) -> None:
        record = parameter_record(weight)
        self.main_grad, self._deferred = record.main_grad, record.deferred
        self._parameter = None if self._deferred is None else weight  # a leaf: it holds no graph

    @property
    def later(self) -> bool:
        """Whether a backward now defers the product."""
        return self._deferred is not None and self._deferred.open

    def add(self, operands: Operands) -> torch.Tensor | None:
        """Compute or defer the gradient; return it for autograd, or None if it goes to main_grad or is deferred."""
        return self.fill(lambda main_grad: weight_gradient(*operands(), main_grad))

    def fill(self, compute: Gradient) -> torch.Tensor | None:
        """Compute or defer a gradient of any products; as add."""
        if self._deferred is None or not self.later:
            return compute(self.main_grad)
        self._deferred.append(lambda: self._accumulate(compute))
        return None

    @torch.no_grad()  # as in a backward: saved activations still require a gradient
    def _accumulate(self, compute: Gradient) -> None:
        """Add the gradient to the parameter as autograd would: grad is the first gradient, later ones are added."""
        gradient, parameter = compute(self.main_grad), self._parameter
        assert parameter is not None
        if gradient is not None and parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None and parameter.grad is not None:
            parameter.grad.add_(gradient)


def weight_gradient(
    dy: torch.Tensor, x: torch.Tensor, main_grad: Callable[[], torch.Tensor] | None
) -> torch.Tensor | None:
    """Return dy [T, O].T @ x [T, I], [O, I]; with a main_grad add it there and return None.

    A parameter's main_grad returns a float32 tensor in its shape (data_parallel.GradientBuckets sets it). The product
    accumulates into it in float32: no other gradient of the parameter's size is made, rounded or added.
    """
    if main_grad is None:
        return product(dy.t(), x.t())
    total = main_grad()
    if dy.device.type == "cpu" and dy.dtype != total.dtype:  # on a CPU, products of bfloat16 round to bfloat16
        dy, x = dy.float(), x.float()
    product(dy.t(), x.t(), out=total, add=True)
    return None

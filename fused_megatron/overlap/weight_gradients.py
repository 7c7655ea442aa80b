"""The gradient of a weight: where it goes, and whether now or later."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fused_megatron.ops.product import product

# The operands (dy [T, O], x [T, I]) of the product dy.T @ x [O, I].
Operands = Callable[[], tuple[torch.Tensor, torch.Tensor]]


class DeferredWeightGradients:
    """Products that backward leaves for later, so that a pipeline sends the gradient of its input first.

    A parameter that has one as its attribute `deferred_weight_gradients` hands over its products while
    `collecting` is entered; outside, everything is as without. No graph is cut, so recomputation, tied weights and
    main_grad work as ever. A weight that is not the parameter itself (cast by autocast, made by a function) has no
    such attribute and is never put off.
    """

    def __init__(self) -> None:
        self._into: list[Callable[[], None]] | None = None

    @contextmanager
    def collecting(self, products: list[Callable[[], None]]) -> Iterator[None]:
        """Append the products of backward passes in this context to a list; the caller runs them, in order."""
        assert self._into is None, "one backward at a time"
        self._into = products
        try:
            yield
        finally:
            self._into = None

    @property
    def open(self) -> bool:
        """Whether a backward now leaves its products."""
        return self._into is not None

    def append(self, product: Callable[[], None]) -> None:
        """One product; only while open."""
        assert self._into is not None
        self._into.append(product)


class GradientDestination:
    """Where a weight's gradient goes, looked up in the forward: its main_grad, its store of deferred products."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.main_grad: torch.Tensor | None = getattr(weight, "main_grad", None)
        self._deferred: DeferredWeightGradients | None = getattr(weight, "deferred_weight_gradients", None)
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

    A parameter's `main_grad` is a float32 tensor of its shape (training.GradientBuckets sets it). The product then
    accumulates into it in float32: no gradient of the parameter's size is made, rounded or added.
    """
    if main_grad is None:
        return product(dy.t(), x.t())
    if not dy.is_cuda and dy.dtype != main_grad.dtype:  # the CPU's products of bfloat16 round their result to bfloat16
        dy, x = dy.float(), x.float()
    product(dy.t(), x.t(), out=main_grad, add=True)
    return None

"""Check of a provider's outputs and gradients against the exact result."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fused_megatron.checks import first_line

# Largest norm of the error over the norm of the exact result. float32: sums of 1e5 terms in another order. 16 bit: one
# or two roundings (half a unit each), and torch's own sums in 16 bit; ours is rounded once.
INEXACT = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# No rounding explains a larger error.
WRONG = 0.25
_PIECE_ELEMENTS = 1 << 24
MESSAGE_CHARACTERS = 160
"""Length to which an error message is cut to fit into a table."""

Op = Callable[..., Any]
Tensors = Sequence[torch.Tensor]
# From (inputs, upstream gradients, outputs, gradients) to the exact outputs and gradients.
Exact = Callable[[Sequence[Any], Tensors, Tensors, Tensors], Tensors]


@dataclass(frozen=True)
class ForwardBackward:
    """One step: run an op on its inputs, and compute the gradient of every input that requires one."""

    op: Op
    inputs: Sequence[Any]
    upstream: Tensors

    def forward(self) -> tuple[torch.Tensor, ...]:
        return as_tuple(self.op(*self.inputs))

    def backward(self, outputs: Tensors) -> Tensors:
        wanted = [t for t in self.inputs if isinstance(t, torch.Tensor) and t.requires_grad]
        return torch.autograd.grad(outputs, wanted, self.upstream)

    def __call__(self) -> tuple[Tensors, Tensors]:
        """Return (outputs, gradients)."""
        outputs = self.forward()
        return outputs, self.backward(outputs)


class Judge:
    """Exact result of a step, and the judgement on the results of providers.

    Args:
        step: the op in plain torch; its result in exact_dtype counts as exact.
        exact_dtype: dtype of the exact result.
        exact: computes the exact result instead, for an op with random draws.
        strict: name of the provider for which an inexact result is an error.
    """

    def __init__(self, step: ForwardBackward, exact_dtype: torch.dtype, exact: Exact | None, strict: str) -> None:
        self._step, self._exact_of, self._strict = step, exact, strict
        self._dtype = next(t.dtype for t in step.inputs if isinstance(t, torch.Tensor))
        self._before = self._fingerprint()
        self._exact: Tensors | None = None
        if exact is None:
            inputs = [_as_exact(t, exact_dtype) for t in step.inputs]
            outputs, gradients = ForwardBackward(step.op, inputs, [t.to(exact_dtype) for t in step.upstream])()
            self._exact = [*(t.detach() for t in outputs), *gradients]

    def _fingerprint(self) -> list[float]:
        tensors = [t for t in self._step.inputs if isinstance(t, torch.Tensor)]
        return [t.detach().sum(dtype=torch.float64).item() for t in (*tensors, *self._step.upstream)]

    def fault(self, provider: str, outputs: Tensors, gradients: Tensors) -> tuple[str | None, str | None]:
        """Judge a provider's result: return (the reason not to time it, or None; a remark, or None).

        Raises:
            RuntimeError: the provider has written over its inputs.
        """
        if self._fingerprint() != self._before:
            raise RuntimeError("it writes over its inputs, which the other providers need")
        try:
            exact = self._exact or self._exact_of(self._step.inputs, self._step.upstream, outputs, gradients)  # type: ignore
        except AssertionError as impossible:
            return f"wrong: {first_line(impossible, name_type=False)[:MESSAGE_CHARACTERS]}", None
        names = [f"output {i}" for i in range(len(outputs))] + [f"gradient {i}" for i in range(len(gradients))]
        worst = 0.0
        off = []
        for name, got, want in zip(names, (*outputs, *gradients), exact, strict=True):
            if got.shape != want.shape:
                return f"wrong: {name} has shape {tuple(got.shape)}, not {tuple(want.shape)}", None
            error = _relative_error(got.detach(), want)
            if not error <= INEXACT[self._dtype]:  # also NaN
                worst = error if not error <= worst else worst
                off.append(f"{name} {error:.1%}" if error > 1e-3 else f"{name} {error:.1e}")
        if not off:
            return None, None
        text = f"{', '.join(off)} off"
        if provider == self._strict or not worst <= WRONG:
            return f"wrong: {text}", None
        return None, f"inexact: {text}"


def _relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the norm of the error over the norm of `want`, in pieces: a whole difference could take gigabytes."""
    error = norm = 0.0
    for some, right in zip(*(t.reshape(-1).split(_PIECE_ELEMENTS) for t in (got, want)), strict=True):
        error += torch.linalg.vector_norm(some.to(want.dtype) - right).item() ** 2
        norm += torch.linalg.vector_norm(right).item() ** 2
    return math.sqrt(error / norm) if norm > 0 else math.sqrt(error)


def _as_exact(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    """Return the outputs of an op as a tuple."""
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)

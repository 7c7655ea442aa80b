"""The base of every autograd function of the package, and the transforms of torch that it refuses by name."""

from typing import Any, ClassVar

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

# Private, and what torch.autograd.Function.apply itself asks; 40 ns a call.
transform_is_active = torch._C._are_functorch_transforms_active
"""Whether the code runs inside a transform of torch.func, where tensors may have no values to look at."""


class AutogradFunction(torch.autograd.Function):
    """A torch.autograd.Function that names its op where a transform of torch.func or forward mode meets it.

    torch would ask the user to write a setup_context, without a word of which function lacks one. To write them is no
    way out: torch then binds the signature with each call, which costs more than the op.

    Attributes:
        op: the public name below fused_megatron, such as "ops.layer_norm".
    """

    op: ClassVar[str]
    # For callers that have asked for both already: the layers' collectives, whose way to the first byte is short.
    apply_untransformed: ClassVar[Any] = torch._C._FunctionBase.__dict__["apply"]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As torch's.

        Raises:
            RuntimeError: inside torch.func.grad, vmap, jvp or what is made of them, or for a tensor with a tangent.
        """
        if transform_is_active() or (forward_ad._current_level >= 0 and any(map(_has_tangent, args))):
            raise _refusal(cls.op_of(*args))
        # What torch's own apply does from here on, which asks for transforms and setup_context once more.
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]

    @classmethod
    def op_of(cls, *args: Any) -> str:
        """The op that such arguments are of, for a class of several ops."""
        return cls.op


def is_differentiated() -> bool:
    """Whether an op must go through its AutogradFunction: also in forward mode, which torch.no_grad does not end.

    Without it the raw op would run, and torch would take its result for a constant: silently tangents of 0.
    """
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def is_in_forward_mode() -> bool:
    """Whether tensors may have tangents."""
    return forward_ad._current_level >= 0


def check_no_transform(op: str, *args: Any) -> None:
    """Raise as AutogradFunction.apply, for an op that has no gradient: its result would count as a constant."""
    if transform_is_active() or (forward_ad._current_level >= 0 and any(map(_has_tangent, args))):
        raise _refusal(op)


def _refusal(op: str) -> RuntimeError:
    other = " (or float64 inputs, for which plain PyTorch runs)" if op.startswith("ops.") else ""
    return RuntimeError(
        f"fused_megatron.{op} does not support torch.func (grad, vmap, jvp) and forward-mode gradients; "
        f"use backward() or torch.autograd.grad{other}"
    )


def _has_tangent(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None

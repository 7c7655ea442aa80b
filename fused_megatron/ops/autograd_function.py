"""Base class of the package's autograd functions; it refuses torch.func and forward mode with a clear error."""

from typing import Any, ClassVar

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

# Private, but torch.autograd.Function.apply uses it too; 40 ns a call.
transform_is_active = torch._C._are_functorch_transforms_active
"""Whether a transform of torch.func is active; tensors may have no values then."""


class AutogradFunction(torch.autograd.Function):
    """A torch.autograd.Function whose error names the op when it is used under torch.func or in forward mode.

    torch's own error asks the user to write a setup_context and does not name the function. Writing setup_context here
    is no solution: torch then binds the signature at each call, which costs more than the op.

    Attributes:
        op: the public name below fused_megatron, for example "ops.layer_norm".
        float64_is_plain: whether float64 runs on plain PyTorch, which has what this class refuses.
    """

    op: ClassVar[str]
    float64_is_plain: ClassVar[bool] = True
    # Without the checks, for callers that made them already: collectives of layers, where the latency counts.
    apply_untransformed: ClassVar[Any] = torch._C._FunctionBase.__dict__["apply"]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Run forward and record backward, as torch.autograd.Function.apply.

        Raises:
            RuntimeError: a transform of torch.func (grad, vmap, jvp, ...) is active, or a tensor has a tangent.
        """
        if transform_is_active() or (forward_ad._current_level >= 0 and any(map(_has_tangent, args))):
            raise _refusal(cls.op_of(*args), cls.float64_is_plain)
        # The rest of torch's apply, without its own checks for transforms and setup_context.
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]

    @classmethod
    def op_of(cls, *args: Any) -> str:
        """Return the public name of the op for these arguments, for a class that serves several ops."""
        return cls.op


def is_differentiated() -> bool:
    """Return whether an op must use its AutogradFunction: with grad enabled, or in forward mode even under no_grad.

    In forward mode the raw op would return a result that torch treats as a constant: all tangents silently 0.
    """
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def is_in_forward_mode() -> bool:
    """Return whether forward-mode differentiation is active, so that tensors may have tangents."""
    return forward_ad._current_level >= 0


def check_no_transform(op: str, *args: Any) -> None:
    """Raise as AutogradFunction.apply does, for an op without a gradient: torch would treat its result as constant."""
    if transform_is_active() or (forward_ad._current_level >= 0 and any(map(_has_tangent, args))):
        raise _refusal(op)


def _refusal(op: str, float64_is_plain: bool = True) -> RuntimeError:
    other = " (or float64 inputs, for which plain PyTorch runs)" if float64_is_plain and op.startswith("ops.") else ""
    return RuntimeError(
        f"fused_megatron.{op} does not support torch.func (grad, vmap, jvp) and forward-mode gradients; "
        f"use backward() or torch.autograd.grad{other}"
    )


def _has_tangent(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None

"""Parts that bias_gelu, bias_swiglu and bias_geglu share: argument checks, raw ops, one autograd Function."""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.checks import InputError, check_dtype, check_same_device, check_shape
from fused_megatron.ops.autograd_function import AutogradFunction
from fused_megatron.ops.registration import FLOAT_DTYPES, define_op


class ActivationOps(NamedTuple):
    """The raw ops of an activation: forward(x, bias, *flags) and backward(dy, x, bias, *flags, need_dx, need_dbias)."""

    name: str
    forward: Any
    backward: Any


def define_activation(name: str, flags: str, reference: Any, *, gated: bool) -> ActivationOps:
    """Define the ops <name>_forward and <name>_backward; `flags` extends their schema, for example ", bool tanh"."""

    def fake_forward(x: torch.Tensor, bias: torch.Tensor | None, *flags: bool) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2)) if gated else x.new_empty(x.shape)

    def fake_backward(
        dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, *flags: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        *_, need_dx, need_dbias = flags
        dbias = x.new_empty(0) if bias is None or not need_dbias else bias.new_empty(bias.shape)
        return x.new_empty(x.shape if need_dx else (0,)), dbias

    return ActivationOps(
        name,
        define_op(
            f"{name}_forward(Tensor x, Tensor? bias{flags}) -> Tensor",
            reference=getattr(reference, f"{name}_forward"),
            fake=fake_forward,
        ),
        define_op(
            f"{name}_backward(Tensor dy, Tensor x, Tensor? bias{flags}, bool need_dx, bool need_dbias)"
            " -> (Tensor dx, Tensor dbias)",
            reference=getattr(reference, f"{name}_backward"),
            fake=fake_backward,
        ),
    )


class BiasActivation(AutogradFunction):
    """Activation of x + bias: apply(x, bias, ops, *flags)."""

    op = "ops.bias_gelu"

    @classmethod
    def op_of(cls, x: torch.Tensor, bias: torch.Tensor | None, ops: ActivationOps, *flags: bool) -> str:
        return f"ops.{ops.name}"

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, ops: ActivationOps, *flags: bool) -> torch.Tensor:
        # Forward and backward use the same contiguous copy.
        x = x.contiguous()
        ctx.save_for_backward(x, bias)
        ctx.ops = ops
        ctx.flags = flags
        return ops.forward(x, bias, *flags)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, bias = ctx.saved_tensors
        need_dx, need_dbias, *_ = ctx.needs_input_grad
        dx, dbias = ctx.ops.backward(dy, x, bias, *ctx.flags, need_dx, need_dbias)
        return dx if need_dx else None, dbias if need_dbias else None, None, *(None for _ in ctx.flags)


def check_activation(x: torch.Tensor, bias: torch.Tensor | None, *, gated: bool) -> None:
    """Raise unless x and bias fit each other and, if gated, the last dim of x is even."""
    check_dtype("x", x, FLOAT_DTYPES)
    if gated and (x.dim() == 0 or x.shape[-1] % 2):
        raise InputError(f"x.shape={tuple(x.shape)} must have an even last dim: gate and value, each half of it")
    if bias is None:
        return
    if x.dim() == 0:
        raise InputError("x.dim()=0 must be at least 1 when there is a bias")
    check_shape("bias", bias, x.shape[-1:])
    check_dtype("bias", bias, FLOAT_DTYPES)
    check_same_device("bias", bias, "x", x)


def check_approximate(approximate: str) -> None:
    """Raise unless approximate is a form of GELU."""
    if approximate not in ("tanh", "none"):
        raise InputError(f"approximate={approximate!r} must be 'tanh' or 'none'")


def has_float64(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Return whether an argument is float64, which only the reference takes, under plain autograd."""
    return x.dtype == torch.float64 or (bias is not None and bias.dtype == torch.float64)

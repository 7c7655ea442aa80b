"""Fused silu(gate) * up * weight of each row, the activation of experts, with its gradients."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.checks import InputError, check_dtype, check_same_device, check_shape
from fused_megatron.ops.autograd_function import AutogradFunction, is_differentiated
from fused_megatron.ops.registration import FLOAT_DTYPES, define_op, register_triton
from fused_megatron.reference import weighted_swiglu as reference


def _fake_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_y: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(dy.shape if need_y else 0)


_forward = define_op(
    "weighted_swiglu_forward(Tensor x, Tensor weight) -> Tensor",
    reference=reference.weighted_swiglu_forward,
    fake=lambda x, weight: x.new_empty((x.shape[0], x.shape[1] // 2)),
)
_backward = define_op(
    "weighted_swiglu_backward(Tensor dy, Tensor x, Tensor weight, bool need_y)"
    " -> (Tensor dx, Tensor dweight, Tensor y)",
    reference=reference.weighted_swiglu_backward,
    fake=_fake_backward,
)
register_triton("weighted_swiglu_forward", "weighted_swiglu")
register_triton("weighted_swiglu_backward", "weighted_swiglu")


class WeightedSwiglu(AutogradFunction):
    """SwiGLU times a weight for each row: apply(x, weight)."""

    op = "ops.weighted_swiglu"

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        weight = weight.contiguous()
        ctx.save_for_backward(x, weight)
        return _forward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        dx, dweight, _ = _backward(dy, *ctx.saved_tensors, False)
        return dx, dweight


def weighted_swiglu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """SwiGLU of each row times the weight of the row, in one pass over x.

        y[n, j] = silu(x[n, j]) * x[n, F + j] * weight[n],  silu(u) = u / (1 + exp(-u))

    Args:
        x: [N, 2F] float32, bfloat16, float16 or float64: the gate, then the other factor; any strides (copied once if
            not contiguous).
        weight: [N] float32 (float64 if x is): the probabilities of the rows.

    Returns:
        [N, F] in the dtype of x, contiguous.

    Raises:
        InputError: an odd last dim, or shapes or devices that do not fit. TypeError: wrong dtypes.

    Communication: none.

    Memory: saves x and weight only.

    Numerics: float32 inside, one rounding; the gradient of a weight is summed in float32 in a fixed order. float64 runs
        on the PyTorch reference. Backward cannot be differentiated again (except in float64).

    Paper: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    check_dtype("x", x, FLOAT_DTYPES)
    if x.dim() != 2 or x.shape[1] % 2:
        raise InputError(f"x.shape={tuple(x.shape)} must be [rows, 2 F]: gate and up, each half of the last dim")
    check_dtype("weight", weight, (torch.float64 if x.dtype == torch.float64 else torch.float32,))
    check_shape("weight", weight, x.shape[:1])
    check_same_device("weight", weight, "x", x)
    if x.dtype == torch.float64:
        return reference.weighted_swiglu_forward(x, weight)
    if not is_differentiated():
        y: torch.Tensor = _forward(x, weight)
        return y
    return WeightedSwiglu.apply(x, weight)


def weighted_swiglu_gradients(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dx, dweight, y) of weighted_swiglu, for autograd functions that need y again but do not keep it.

    Args:
        dy: [N, F] in the dtype of x.
        x: [N, 2F] and weight: [N] as in weighted_swiglu.

    Returns:
        dx [N, 2F], dweight [N] and y [N, F], in one pass over dy and x.
    """
    if x.dtype == torch.float64:
        return reference.weighted_swiglu_backward(dy, x, weight, True)
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _backward(dy, x, weight, True)
    return gradients

"""gelu(x + bias), fused, with its gradients."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.checks import InputError, check_dtype, check_same_device, check_shape
from fused_megatron.ops.registration import define_op
from fused_megatron.reference import bias_gelu as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _fake_backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, tanh: bool, need_dx: bool, need_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else x.new_empty(0)
    return dx, x.new_empty(0) if bias is None or not need_dbias else torch.empty_like(bias)


_forward = define_op(
    "bias_gelu_forward(Tensor x, Tensor? bias, bool tanh) -> Tensor",
    reference=reference.bias_gelu_forward,
    fake=lambda x, bias, tanh: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_backward = define_op(
    "bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, bool tanh, bool need_dx, bool need_dbias)"
    " -> (Tensor dx, Tensor dbias)",
    reference=reference.bias_gelu_backward,
    fake=_fake_backward,
)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, tanh: bool) -> torch.Tensor:
        # One copy here serves forward and backward.
        x = x.contiguous()
        ctx.save_for_backward(x, bias)
        ctx.tanh = tanh
        return _forward(x, bias, tanh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, bias = ctx.saved_tensors
        need_dx, need_dbias, _ = ctx.needs_input_grad
        dx, dbias = _backward(dy, x, bias, ctx.tanh, need_dx, need_dbias)
        return dx if need_dx else None, dbias if need_dbias else None, None


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None = None, approximate: str = "tanh") -> torch.Tensor:
    """GELU of x + bias in one pass over x.

    Equals torch.nn.functional.gelu(x + bias, approximate=approximate). With u = x + bias:

        "tanh":  y = u / 2 * (1 + tanh(sqrt(2 / pi) * (u + 0.044715 u^3)))
        "none":  y = u / 2 * (1 + erf(u / sqrt(2)))

    Args:
        x: [..., F] float32, bfloat16, float16 or float64; any strides (one that is not contiguous is copied once).
        bias: [F], any of these dtypes, or None.
        approximate: "tanh" or "none".

    Returns:
        [..., F] in the dtype of x, contiguous.

    Raises:
        InputError: bias is not [F] or lies on another device, or approximate has another value.
        TypeError: a dtype that is not floating point.

    Communication: none.

    Memory: x and bias are saved for backward; the sum x + bias never exists in memory.

    Numerics: float32 inside, ONE rounding to the output's dtype; dbias is summed in float32 in a fixed order, so two
    runs agree bit for bit, on the CPU for any number of threads. float64 runs on the PyTorch reference. Backward
    cannot be differentiated again (except in float64).

    Paper: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv:1606.08415.
    """
    if approximate not in ("tanh", "none"):
        raise InputError(f"approximate={approximate!r} must be 'tanh' or 'none'")
    check_dtype("x", x, _DTYPES)
    if bias is not None:
        if x.dim() == 0:
            raise InputError("x.dim()=0 must be at least 1 when there is a bias")
        check_shape("bias", bias, x.shape[-1:])
        check_dtype("bias", bias, _DTYPES)
        check_same_device("bias", bias, "x", x)
    if x.dtype == torch.float64 or (bias is not None and bias.dtype == torch.float64):
        return reference.bias_gelu(x.contiguous(), bias, approximate)
    if not torch.is_grad_enabled():
        return _forward(x, bias, approximate == "tanh")
    return _BiasGelu.apply(x, bias, approximate == "tanh")

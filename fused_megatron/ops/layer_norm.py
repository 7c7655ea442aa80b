"""Layer normalisation over the last dim, with its gradients."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.checks import InputError, check_dtype, check_same_device, check_shape
from fused_megatron.ops.registration import define_op
from fused_megatron.reference import layer_norm as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _fake_forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.shape[:-1]
    return y, x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _fake_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else x.new_empty(0),
        x.new_empty(0) if weight is None or not need_dweight else weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None or not need_dbias else bias.new_empty(bias.shape),
    )


_forward = define_op(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    reference=reference.layer_norm_forward,
    fake=_fake_forward,
)
# bias is an argument of backward for its dtype alone: dbias does not depend on its values.
_backward = define_op(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    reference=reference.layer_norm_backward,
    fake=_fake_backward,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        # One copy here serves forward and backward.
        x = x.contiguous()
        y, mean, rstd = _forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        need_dx, need_dweight, need_dbias, _ = ctx.needs_input_grad
        dx, dweight, dbias = _backward(dy, x, weight, bias, mean, rstd, need_dx, need_dweight, need_dbias)
        return dx if need_dx else None, dweight if need_dweight else None, dbias if need_dbias else None, None


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Normalise every row of x over the last dim, then scale and shift it.

    Equals torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps). For every row x of width H:

        mean = sum(x) / H;  rstd = 1 / sqrt(sum((x - mean)^2) / H + eps);  y = (x - mean) * rstd * weight + bias

    and backward, with n = (x - mean) * rstd and g = dy * weight:

        dx = rstd * (g - mean(g) - n * mean(g * n));  dweight = sum over rows of dy * n;  dbias = sum over rows of dy

    Args:
        x: [..., H] float32, bfloat16, float16 or float64; any strides (one that is not contiguous is copied once).
        weight: [H], any of these dtypes, or None for 1.
        bias: [H], any of these dtypes, or None for 0.
        eps: added to the variance.

    Returns:
        [..., H] in the dtype of x, contiguous.

    Raises:
        InputError: x has no dim or no column, weight or bias is not [H] or lies on another device.
        TypeError: a dtype that is not floating point.

    Communication: none.

    Memory: x, and mean and rstd of every row (8 bytes a row), are saved for backward.

    Numerics: float32 inside (the variance from centred values), ONE rounding to the output's dtype; dweight and dbias
    are summed in float32 in a fixed order, so two runs agree bit for bit, on the CPU for any number of threads.
    float64 runs on the PyTorch reference. Backward cannot be differentiated again (except in float64).

    Paper: Ba, Kiros and Hinton, Layer Normalization, arXiv:1607.06450.
    """
    check_dtype("x", x, _DTYPES)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise InputError(f"x.shape={tuple(x.shape)} must have a last dim of at least 1")
    wide = x.dtype == torch.float64
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_shape(name, parameter, x.shape[-1:])
            check_dtype(name, parameter, _DTYPES)
            check_same_device(name, parameter, "x", x)
            wide = wide or parameter.dtype == torch.float64
    if wide:
        return reference.layer_norm(x, weight, bias, eps)
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, eps)[0]
    return _LayerNorm.apply(x, weight, bias, eps)

"""Layer normalisation over the last dim, with its gradients; optionally fused with the residual addition."""

from typing import Any, Literal, overload

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.ops.autograd_function import AutogradFunction, is_differentiated
from fused_megatron.ops.norm import empty_or_like, gradient_without_y, needs_reference
from fused_megatron.ops.registration import define_op
from fused_megatron.reference import layer_norm as reference


def _fake_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    zero_centered_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.shape[:-1]
    total = x.new_empty(0) if residual is None else empty_or_like(residual, True)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return empty_or_like(x, True), mean, rstd, total


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
    dtotal: torch.Tensor | None = None,
    need_dresidual: bool = False,
    zero_centered_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        empty_or_like(x, need_dx, dy.dtype) if need_dx else dy.new_empty(0),
        dy.new_empty(0) if weight is None or not need_dweight else weight.new_empty(weight.shape),
        dy.new_empty(0) if bias is None or not need_dbias else bias.new_empty(bias.shape),
        empty_or_like(x, need_dresidual),
    )


_forward = define_op(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? residual=None,"
    " bool zero_centered_weight=False) -> (Tensor y, Tensor mean, Tensor rstd, Tensor total)",
    reference=reference.layer_norm_forward,
    fake=_fake_forward,
)
# backward takes bias only for its dtype: dbias does not depend on its values.
_backward = define_op(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " bool need_dx, bool need_dweight, bool need_dbias, Tensor? dtotal=None, bool need_dresidual=False,"
    " bool zero_centered_weight=False) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    reference=reference.layer_norm_backward,
    fake=_fake_backward,
)


class _LayerNorm(AutogradFunction):
    """The op under autograd: returns y, or (y, total) with a residual or return_total."""

    op = "ops.layer_norm"

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        residual: torch.Tensor | None,
        zero_centered_weight: bool,
        return_total: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        # Forward and backward use the same contiguous copy.
        x = x.contiguous()
        y, mean, rstd, total = _forward(x, weight, bias, eps, residual, zero_centered_weight)
        ctx.set_materialize_grads(False)
        ctx.zero_centered_weight = zero_centered_weight
        ctx.dtype = x.dtype
        if residual is None:
            ctx.save_for_backward(x, weight, bias, mean, rstd)
            return (y, x) if return_total else y
        ctx.save_for_backward(total, weight, bias, mean, rstd)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None, dtotal: torch.Tensor | None = None) -> Any:
        need_dx, need_dweight, need_dbias, _, need_dresidual, *_ = ctx.needs_input_grad
        if dy is None:
            if dtotal is None:
                return (None,) * 7
            dx, dresidual = gradient_without_y(dtotal, ctx.dtype, need_dx, need_dresidual)
            return dx, None, None, None, dresidual, None, None
        x, weight, bias, mean, rstd = ctx.saved_tensors
        # If their dtypes are equal, the gradients of x and residual are one tensor, as in torch's addition.
        shared = x.dtype == dy.dtype
        dx, dweight, dbias, dresidual = _backward(
            dy,
            x,
            weight,
            bias,
            mean,
            rstd,
            need_dx or (need_dresidual and shared),
            need_dweight,
            need_dbias,
            dtotal,
            need_dresidual and not shared,
            ctx.zero_centered_weight,
        )
        return (
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            None,
            (dx if shared else dresidual) if need_dresidual else None,
            None,
            None,
        )


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: None = None,
    zero_centered_weight: bool = False,
    return_total: Literal[False] = False,
) -> torch.Tensor: ...
@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor,
    zero_centered_weight: bool = False,
    return_total: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    zero_centered_weight: bool = False,
    return_total: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None,
    zero_centered_weight: bool = False,
    return_total: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    zero_centered_weight: bool = False,
    return_total: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise every row of x (or of x + residual) over the last dim, then scale and shift it.

    Equals torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps). For every row of width H:

        mean = sum(x) / H;  rstd = 1 / sqrt(sum((x - mean)^2) / H + eps);  y = (x - mean) * rstd * weight + bias

    and backward, with n = (x - mean) * rstd and g = dy * weight:

        dx = rstd * (g - mean(g) - n * mean(g * n));  dweight = sum over rows of dy * n;  dbias = sum over rows of dy

    With a residual, total = x + residual replaces x in these formulas, in the same pass over memory. Backward adds the
    gradient of total to dx in the same pass, and dresidual equals dx.

    Args:
        x: [..., H] float32, bfloat16, float16 or float64; any strides (copied once if not contiguous).
        weight: [H], any of these dtypes, or None for 1.
        bias: [H], any of these dtypes, or None for 0.
        eps: added to the variance.
        residual: [..., H] in the dtype of x, float32 or float64; or None.
        zero_centered_weight: scale by 1 + weight.
        return_total: return total also without a residual, where it is x itself: use it in place of x afterwards, and
            backward adds both gradients of x in the same pass.

    Returns:
        y [..., H] in the dtype of x, contiguous. With a residual or return_total (y, total): total [..., H] in the
        dtype of residual, or of x.

    Raises:
        InputError: x has no dim or no column, weight or bias is not [H], residual does not have the shape of x, or one
            of them is on another device.
        TypeError: a dtype that is not floating point, or a residual of another 16-bit dtype than x.

    Communication: none.

    Memory: saves x (with a residual: total instead of x), and mean and rstd of every row (8 bytes per row).

    Numerics: float32 inside (the variance from centred values), ONE rounding to the output's dtype. dweight and dbias
    are summed in float32 in a fixed order, so that runs agree bit for bit, on the CPU with any number of threads. With
    a residual, y is computed from the rounded total, as backward and layer_norm(x + residual) do. float64 runs on the
    PyTorch reference. Backward cannot be differentiated again (except in float64).

    Paper: Ba, Kiros and Hinton, Layer Normalization, arXiv:1607.06450.
    """
    if needs_reference(x, weight, bias, residual):
        found: Any = reference.layer_norm(x, weight, bias, eps, residual, zero_centered_weight)
        return (found, x) if return_total and residual is None else found
    if is_differentiated():
        return _LayerNorm.apply(x, weight, bias, eps, residual, zero_centered_weight, return_total)
    y, _, _, total = _forward(x, weight, bias, eps, residual, zero_centered_weight)
    if residual is None:
        return (y, x) if return_total else y
    return y, total

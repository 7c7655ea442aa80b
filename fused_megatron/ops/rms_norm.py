"""Root-mean-square normalisation over the last dim, with its gradients; optionally fused with the residual addition."""

from typing import Any, Literal, overload

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.ops.autograd_function import AutogradFunction, is_differentiated
from fused_megatron.ops.norm import empty_or_like, gradient_without_y, needs_reference
from fused_megatron.ops.registration import define_op
from fused_megatron.reference import rms_norm as reference


def _fake_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    zero_centered_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = x.new_empty(0) if residual is None else empty_or_like(residual, True)
    return empty_or_like(x, True), x.new_empty(x.shape[:-1], dtype=torch.float32), total


def _fake_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    need_dx: bool,
    need_dweight: bool,
    dtotal: torch.Tensor | None = None,
    need_dresidual: bool = False,
    zero_centered_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        empty_or_like(x, need_dx, dy.dtype) if need_dx else dy.new_empty(0),
        dy.new_empty(0) if weight is None or not need_dweight else weight.new_empty(weight.shape),
        empty_or_like(x, need_dresidual),
    )


_forward = define_op(
    "rms_norm_forward(Tensor x, Tensor? weight, float eps, Tensor? residual=None, bool zero_centered_weight=False)"
    " -> (Tensor y, Tensor rstd, Tensor total)",
    reference=reference.rms_norm_forward,
    fake=_fake_forward,
)
_backward = define_op(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, bool need_dx, bool need_dweight,"
    " Tensor? dtotal=None, bool need_dresidual=False, bool zero_centered_weight=False)"
    " -> (Tensor dx, Tensor dweight, Tensor dresidual)",
    reference=reference.rms_norm_backward,
    fake=_fake_backward,
)


class _RMSNorm(AutogradFunction):
    """The op under autograd: returns y, or (y, total) with a residual or return_total."""

    op = "ops.rms_norm"

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        residual: torch.Tensor | None,
        zero_centered_weight: bool,
        return_total: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        # Forward and backward use the same contiguous copy.
        x = x.contiguous()
        y, rstd, total = _forward(x, weight, eps, residual, zero_centered_weight)
        ctx.set_materialize_grads(False)
        ctx.zero_centered_weight = zero_centered_weight
        ctx.dtype = x.dtype
        if residual is None:
            ctx.save_for_backward(x, weight, rstd)
            return (y, x) if return_total else y
        ctx.save_for_backward(total, weight, rstd)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None, dtotal: torch.Tensor | None = None) -> Any:
        need_dx, need_dweight, _, need_dresidual, *_ = ctx.needs_input_grad
        if dy is None:
            if dtotal is None:
                return (None,) * 6
            dx, dresidual = gradient_without_y(dtotal, ctx.dtype, need_dx, need_dresidual)
            return dx, None, None, dresidual, None, None
        x, weight, rstd = ctx.saved_tensors
        # If their dtypes are equal, the gradients of x and residual are one tensor, as in torch's addition.
        shared = x.dtype == dy.dtype
        dx, dweight, dresidual = _backward(
            dy,
            x,
            weight,
            rstd,
            need_dx or (need_dresidual and shared),
            need_dweight,
            dtotal,
            need_dresidual and not shared,
            ctx.zero_centered_weight,
        )
        return (
            dx if need_dx else None,
            dweight if need_dweight else None,
            None,
            (dx if shared else dresidual) if need_dresidual else None,
            None,
            None,
        )


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    residual: None = None,
    zero_centered_weight: bool = False,
    return_total: Literal[False] = False,
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    residual: torch.Tensor,
    zero_centered_weight: bool = False,
    return_total: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    residual: torch.Tensor | None = None,
    zero_centered_weight: bool = False,
    return_total: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    residual: torch.Tensor | None,
    zero_centered_weight: bool = False,
    return_total: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    residual: torch.Tensor | None = None,
    zero_centered_weight: bool = False,
    return_total: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Divide every row of x (or of x + residual) by its root mean square, then scale it.

    Equals torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps). For every row x of width H:

        rstd = 1 / sqrt(sum(x^2) / H + eps);  y = x * rstd * weight

    and backward, with n = x * rstd and g = dy * weight:

        dx = rstd * (g - n * mean(g * n));  dweight = sum over rows of dy * n

    With a residual, total = x + residual replaces x in these formulas, in the same pass over memory. Backward adds the
    gradient of total to dx in the same pass, and dresidual equals dx.

    Args:
        x: [..., H] float32, bfloat16, float16 or float64; any strides (copied once if not contiguous).
        weight: [H], any of these dtypes, or None for 1.
        eps: added to the mean square. None: the eps of the precision of the computation, as in F.rms_norm: of float32
            (1.2e-7) also for 16-bit x, of float64 for float64 x.
        residual: [..., H] in the dtype of x, float32 or float64; or None.
        zero_centered_weight: scale by 1 + weight.
        return_total: return total also without a residual, where it is x itself: use it in place of x afterwards, and
            backward adds both gradients of x in the same pass.

    Returns:
        y [..., H] in the dtype of x, contiguous. With a residual or return_total (y, total): total [..., H] in the
        dtype of residual, or of x.

    Raises:
        InputError: x has no dim or no column, weight is not [H], residual does not have the shape of x, or one of them
            is on another device.
        TypeError: a dtype that is not floating point, or a residual of another 16-bit dtype than x.

    Communication: none.

    Memory: saves x (with a residual: total instead of x) and rstd of every row (4 bytes per row).

    Numerics: float32 inside, ONE rounding to the output's dtype. dweight is summed in float32 in a fixed order, so that
    runs agree bit for bit, on the CPU with any number of threads. With a residual, y is computed from the rounded
    total, as backward and rms_norm(x + residual) do. float64 runs on the PyTorch reference. Backward cannot be
    differentiated again (except in float64).

    Paper: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    by_reference = needs_reference(x, weight, None, residual)
    if eps is None:
        eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    if by_reference:
        found: Any = reference.rms_norm(x, weight, eps, residual, zero_centered_weight)
        return (found, x) if return_total and residual is None else found
    if is_differentiated():
        return _RMSNorm.apply(x, weight, eps, residual, zero_centered_weight, return_total)
    y, _, total = _forward(x, weight, eps, residual, zero_centered_weight)
    if residual is None:
        return (y, x) if return_total else y
    return y, total

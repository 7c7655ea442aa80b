"""Fused softmax(scale * x) over the keys that a query may see, with its gradient."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.checks import InputError, check_dtype, check_same_device
from fused_megatron.ops.autograd_function import AutogradFunction, is_in_forward_mode
from fused_megatron.ops.registration import FLOAT_DTYPES, define_op, register_triton
from fused_megatron.reference import scaled_masked_softmax as reference


def _contiguous_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# window=0 means no window.
_forward = define_op(
    "scaled_masked_softmax_forward(Tensor x, Tensor? mask, float scale, bool causal, int window) -> Tensor",
    reference=reference.scaled_masked_softmax_forward,
    fake=lambda x, *rest: _contiguous_like(x),
)
_backward = define_op(
    "scaled_masked_softmax_backward(Tensor dy, Tensor y, float scale, bool causal, int window) -> Tensor",
    reference=reference.scaled_masked_softmax_backward,
    fake=lambda dy, y, *rest: _contiguous_like(y),
)


class _ScaledMaskedSoftmax(AutogradFunction):
    op = "ops.scaled_masked_softmax"

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mask: torch.Tensor | None, scale: float, causal: bool, window: int
    ) -> torch.Tensor:
        y = _forward(x, mask, scale, causal, window)
        ctx.save_for_backward(y)
        ctx.form = (scale, causal, window)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return _backward(dy, y, *ctx.form), None, None, None, None


def scaled_masked_softmax(
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    *,
    causal: bool = False,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax of attention scores over the keys that each query may see.

    Equals torch.softmax((x * scale).masked_fill(hidden, -inf), dim=-1), but rows without a visible key are 0. With
    query i, key j, and d = Sk - Sq (the last query sees the last key):

        hidden_ij = mask_ij  or, if causal,  j > i + d  or, with a window w,  j <= i + d - w
        y_ij = exp(scale x_ij - m_i) / sum_k exp(scale x_ik - m_i),   m_i = max_k scale x_ik,   over keys not hidden
        dx_ij = scale y_ij (dy_ij - sum_k dy_ik y_ik)

    Args:
        x: [..., Sq, Sk] float32, bfloat16, float16 or float64; any strides (copied once if not contiguous). [Sk] is one
            query.
        mask: bool, True = hidden (as in Tensor.masked_fill), any shape that broadcasts to x; or None. It is read in
            place and never expanded: one [B, 1, Sq, Sk] mask serves all heads.
        scale: a finite number, float32 whatever the dtype of x.
        causal: hide the keys after the query. Neither forward nor backward reads them.
        window: number of keys, up to and with the query's own, that a query sees; needs causal. None: no limit.

    Returns:
        The shape and dtype of x, contiguous. Hidden keys are exactly 0. A row in which every key is hidden or -inf is
        0, and its gradient is 0.

    Raises:
        InputError: x has no dimension, mask does not broadcast to x or is on another device, scale is not finite,
            window is below 1 or given without causal.
        TypeError: x is not floating point, mask is not bool.

    Communication: none.

    Memory: saves y for backward, neither x nor the mask. Forward reads each score once, except those that causal and
    window hide, and writes y once; backward reads y and dy in the same way and writes dx once.

    Numerics: float32 inside, ONE rounding to the output's dtype. Every row is summed in a fixed order, so that runs
    agree bit for bit, on the CPU with any number of threads. A NaN or +inf that a query sees makes its row NaN.
    float64 runs on the PyTorch reference. Backward cannot be differentiated again (except in float64).

    Paper: Vaswani et al., Attention Is All You Need, arXiv:1706.03762; the window: Beltagy et al., arXiv:2004.05150.
    """
    check_dtype("x", x, FLOAT_DTYPES)
    if x.dim() == 0:
        raise InputError("x.shape=() must have a dimension of keys")
    if mask is not None:
        _check_mask(mask, x)
    if not -_LARGEST_SCALE <= scale <= _LARGEST_SCALE:  # so that NaN does not pass
        raise InputError(f"scale={scale} must be a finite float32")
    if window is not None:
        if not causal:
            raise InputError(f"window={window} counts keys up to the query: it needs causal=True")
        if window < 1:
            raise InputError(f"window={window} must be at least 1 (None: no window)")
    if x.dtype == torch.float64:
        return reference.scaled_masked_softmax_forward(x, mask, scale, causal, window or 0)
    if (x.requires_grad and torch.is_grad_enabled()) or is_in_forward_mode():
        return _ScaledMaskedSoftmax.apply(x, mask, scale, causal, window or 0)
    return _forward(x, mask, scale, causal, window or 0)


_LARGEST_SCALE = torch.finfo(torch.float32).max


def _check_mask(mask: torch.Tensor, x: torch.Tensor) -> None:
    check_dtype("mask", mask, (torch.bool,))
    check_same_device("mask", mask, "x", x)
    fits = mask.dim() <= x.dim()
    for size, wanted in zip(reversed(mask.shape), reversed(x.shape), strict=False):
        fits = fits and (size in (1, wanted))
    if not fits:
        raise InputError(f"mask.shape={tuple(mask.shape)} must broadcast to x.shape={tuple(x.shape)}")


for _name in ("scaled_masked_softmax_forward", "scaled_masked_softmax_backward"):
    register_triton(_name, "scaled_masked_softmax")

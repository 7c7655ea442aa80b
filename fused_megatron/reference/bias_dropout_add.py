"""residual + dropout(x + bias) in plain PyTorch.

`rows` = (inner, start, stride0, stride1) defines the global index of each element: with x viewed as [rows, width], row
r begins at index start + r // inner * stride0 + r % inner * stride1. inner = 0 means that x is the full tensor.
"""

import torch

from fused_megatron.reference.philox import keep_mask, keep_scale
from fused_megatron.reference.precision import widen

WHOLE = (0, 0, 0, 0)


def bias_dropout_add(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    rng_state: torch.Tensor | None,
    p: float,
    rows: tuple[int, int, int, int] = WHOLE,
) -> torch.Tensor:
    """Return residual + (x + bias) * factor, in fp32 (fp64 if an input is fp64), rounded once to residual.dtype."""
    total = widen(x) if bias is None else widen(x) + widen(bias)
    return (widen(residual) + total * _factor(x.shape, rng_state, p, rows, x.device)).to(residual.dtype)


def bias_dropout_add_forward(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    rng_state: torch.Tensor | None,
    p: float,
    *rows: int,
) -> torch.Tensor:
    """Compute torch.ops.fused_megatron.bias_dropout_add_forward."""
    inner, start, stride0, stride1 = rows
    y = bias_dropout_add(x, bias, residual, rng_state, p, (inner, start, stride0, stride1))
    return y.contiguous()


def bias_dropout_add_backward(
    dy: torch.Tensor,
    bias: torch.Tensor | None,
    rng_state: torch.Tensor | None,
    x_dtype: torch.dtype,
    p: float,
    inner: int,
    start: int,
    stride0: int,
    stride1: int,
    need_dx: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute torch.ops.fused_megatron.bias_dropout_add_backward: (dx, dbias), empty where not needed."""
    grad = widen(dy) * _factor(dy.shape, rng_state, p, (inner, start, stride0, stride1), dy.device)
    dx = grad.to(x_dtype).contiguous() if need_dx else dy.new_empty(0, dtype=x_dtype)
    if bias is None or not need_dbias:
        return dx, dy.new_empty(0)
    return dx, grad.reshape(-1, bias.numel()).sum(dim=0).to(bias.dtype)


def global_indices(shape: torch.Size, rows: tuple[int, int, int, int], device: torch.device) -> torch.Tensor:
    """Return the global index of every element of a slice with this shape; int64."""
    inner, start, stride0, stride1 = rows
    if inner == 0:
        return torch.arange(shape.numel(), device=device).reshape(shape)
    width = shape[-1] if shape else 1
    row = torch.arange(shape.numel() // max(width, 1), device=device)
    first = start + row // inner * stride0 + row % inner * stride1
    return (first[:, None] + torch.arange(width, device=device)).reshape(shape)


def _factor(
    shape: torch.Size,
    rng_state: torch.Tensor | None,
    p: float,
    rows: tuple[int, int, int, int],
    device: torch.device,
) -> torch.Tensor | float:
    """Return the factor of every element: keep_scale(p) in fp32 if it is kept, 0 if it is dropped."""
    if not 0.0 < p < 1.0:
        return 1.0 - p
    assert rng_state is not None
    scale = torch.tensor(keep_scale(p), dtype=torch.float32, device=device)
    return torch.where(keep_mask(rng_state, global_indices(shape, rows, device), p), scale, 0.0)

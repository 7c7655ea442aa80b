"""Normalisation of rows in plain PyTorch: shared by layer_norm (centred) and rms_norm (not centred)."""

import torch

from fused_megatron.reference.precision import widen


def add_residual(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """Return x + residual, rounded to the dtype of residual; without a residual, return x."""
    return x if residual is None else (widen(x) + widen(residual)).to(residual.dtype).contiguous()


def scale_of(weight: torch.Tensor, zero_centered_weight: bool) -> torch.Tensor:
    """Return the factor of the normalised row: weight, or 1 + weight."""
    return 1 + widen(weight) if zero_centered_weight else widen(weight)


def normalise(
    total: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    zero_centered_weight: bool,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (y, mean, rstd) of the rows of total, in fp32 (fp64 for fp64); mean and rstd keep the last dim."""
    wide = widen(total)
    mean = wide.mean(dim=-1, keepdim=True)
    # Centred before it is squared: E[x^2] - E[x]^2 loses everything when the mean is large.
    wide = wide - mean if centred else wide
    rstd = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    y = wide * rstd
    if weight is not None:
        y = y * scale_of(weight, zero_centered_weight)
    if bias is not None:
        y = y + widen(bias)
    return y, mean, rstd


def norm_backward(
    dy: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    dtotal: torch.Tensor | None,
    zero_centered_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (gradient of total, dy * normalised), in fp32 (fp64); mean is None if the rows were not centred."""
    dy_wide = widen(dy)
    wide = widen(total)
    rstd = rstd.unsqueeze(-1)
    normalised = wide * rstd if mean is None else (wide - mean.unsqueeze(-1)) * rstd
    g = dy_wide if weight is None else dy_wide * scale_of(weight, zero_centered_weight)
    gradient = g - normalised * (g * normalised).mean(dim=-1, keepdim=True)
    if mean is not None:
        gradient = gradient - g.mean(dim=-1, keepdim=True)
    gradient = gradient * rstd
    return gradient if dtotal is None else gradient + widen(dtotal), dy_wide * normalised


def sum_of_rows(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sum the rows' contributions to the gradient of a parameter; the result has the dtype of `like`."""
    return rows.reshape(-1, rows.shape[-1]).sum(dim=0).to(like.dtype)

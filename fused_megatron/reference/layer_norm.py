"""Layer normalisation over the last dim in plain PyTorch."""

import torch

from fused_megatron.reference.norm import add_residual, norm_backward, normalise, sum_of_rows
from fused_megatron.reference.precision import widen


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    zero_centered_weight: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return (x - mean) / sqrt(var + eps) * weight + bias, in fp32 (fp64 for fp64), rounded once to x.dtype.

    With a residual, return (y, total): total = x + residual is rounded to residual.dtype, then normalised to y.
    """
    total = add_residual(x, residual)
    y = normalise(total, weight, bias, eps, zero_centered_weight, centred=True)[0].to(x.dtype).contiguous()
    return y if residual is None else (y, total)


def layer_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    zero_centered_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute torch.ops.fused_megatron.layer_norm_forward: (y, mean, rstd, total); total is empty without residual."""
    total = add_residual(x, residual)
    y, mean, rstd = normalise(total, weight, bias, eps, zero_centered_weight, centred=True)
    empty_or_total = x.new_empty(0) if residual is None else total
    return y.to(x.dtype).contiguous(), mean.squeeze(-1).contiguous(), rstd.squeeze(-1).contiguous(), empty_or_total


def layer_norm_backward(
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
    """Compute torch.ops.fused_megatron.layer_norm_backward.

    Args:
        x: the tensor that was normalised: with a residual, the total.

    Returns:
        (dx in the dtype of dy, dweight, dbias, dresidual: dx in the dtype of x); empty where not needed.
    """
    gradient, dy_normalised = norm_backward(dy, x, weight, mean, rstd, dtotal, zero_centered_weight)
    return (
        gradient.to(dy.dtype).contiguous() if need_dx else dy.new_empty(0),
        sum_of_rows(dy_normalised, weight) if need_dweight and weight is not None else dy.new_empty(0),
        sum_of_rows(widen(dy), bias) if need_dbias and bias is not None else dy.new_empty(0),
        gradient.to(x.dtype).contiguous() if need_dresidual else x.new_empty(0),
    )

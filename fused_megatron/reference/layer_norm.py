"""Layer normalisation over the last dim in plain PyTorch."""

import torch

from fused_megatron.reference.precision import widen


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float = 1e-5
) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, computed in fp32 (fp64 for fp64) and rounded once to x.dtype."""
    return layer_norm_forward(x, weight, bias, eps)[0]


def layer_norm_forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What torch.ops.fused_megatron.layer_norm_forward computes: (y, mean, rstd)."""
    wide = widen(x)
    mean = wide.mean(dim=-1, keepdim=True)
    # Centred before it is squared: E[x^2] - E[x]^2 loses everything when the mean is large.
    centred = wide - mean
    rstd = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    y = centred * rstd
    if weight is not None:
        y = y * widen(weight)
    if bias is not None:
        y = y + widen(bias)
    return y.to(x.dtype).contiguous(), mean.squeeze(-1).contiguous(), rstd.squeeze(-1).contiguous()


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What torch.ops.fused_megatron.layer_norm_backward computes: (dx, dweight, dbias); what is not needed is empty."""
    width = x.shape[-1]
    dx, dweight, dbias = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    dy_wide = widen(dy)
    normalised = (widen(x) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    if need_dx:
        g = dy_wide if weight is None else dy_wide * widen(weight)
        projection = (g * normalised).mean(dim=-1, keepdim=True)
        dx = rstd.unsqueeze(-1) * (g - g.mean(dim=-1, keepdim=True) - normalised * projection)
        dx = dx.to(x.dtype).contiguous()
    if need_dweight and weight is not None:
        dweight = (dy_wide * normalised).reshape(-1, width).sum(dim=0).to(weight.dtype)
    if need_dbias and bias is not None:
        dbias = dy_wide.reshape(-1, width).sum(dim=0).to(bias.dtype)
    return dx, dweight, dbias

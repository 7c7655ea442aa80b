"""Activations of x + bias, plain or gated, in plain PyTorch: shared by bias_gelu, bias_swiglu and bias_geglu."""

from collections.abc import Callable

import torch

from fused_megatron.reference.precision import widen

Activation = Callable[[torch.Tensor], torch.Tensor]
ActivationBackward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def forward(x: torch.Tensor, bias: torch.Tensor | None, activation: Activation, *, gated: bool) -> torch.Tensor:
    """Return f(x + bias); gated: f(x1 + b1) * (x2 + b2) of the halves of the last dim. In fp32 (fp64), rounded once."""
    total = _add(x, bias)
    if not gated:
        return activation(total).to(x.dtype)
    gate, value = total.chunk(2, dim=-1)
    return (activation(gate) * value).to(x.dtype)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
    activation_backward: ActivationBackward,
    need_dx: bool,
    need_dbias: bool,
    *,
    gated: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dx, dbias), empty where not needed. activation_backward(dy, u) is dy times the derivative at u."""
    total = _add(x, bias)
    dy = widen(dy)
    if gated:
        gate, value = total.chunk(2, dim=-1)
        dtotal = torch.cat([activation_backward(dy * value, gate), dy * activation(gate)], dim=-1)
    else:
        dtotal = activation_backward(dy, total)
    dbias = x.new_empty(0)
    if need_dbias and bias is not None:
        dbias = dtotal.reshape(-1, bias.numel()).sum(dim=0).to(bias.dtype)
    return dtotal.to(x.dtype).contiguous() if need_dx else x.new_empty(0), dbias


def _add(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return widen(x) if bias is None else widen(x) + widen(bias)

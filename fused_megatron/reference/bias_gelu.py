"""gelu(x + bias) in plain PyTorch."""

import torch
import torch.nn.functional as F

from fused_megatron.reference.precision import widen


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None, approximate: str = "tanh") -> torch.Tensor:
    """gelu(x + bias), computed in fp32 (fp64 for fp64) and rounded once to x.dtype."""
    return F.gelu(_add(x, bias), approximate=approximate).to(x.dtype)


def bias_gelu_forward(x: torch.Tensor, bias: torch.Tensor | None, tanh: bool) -> torch.Tensor:
    """What torch.ops.fused_megatron.bias_gelu_forward computes."""
    return bias_gelu(x.contiguous(), bias, _approximate(tanh))


def bias_gelu_backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, tanh: bool, need_dx: bool, need_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What torch.ops.fused_megatron.bias_gelu_backward computes: (dx, dbias); what is not needed is empty."""
    du = torch.ops.aten.gelu_backward(widen(dy), _add(x, bias), approximate=_approximate(tanh))
    dbias = x.new_empty(0)
    if need_dbias and bias is not None:
        dbias = du.reshape(-1, bias.numel()).sum(dim=0).to(bias.dtype)
    return du.to(x.dtype).contiguous() if need_dx else x.new_empty(0), dbias


def _add(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return widen(x) if bias is None else widen(x) + widen(bias)


def _approximate(tanh: bool) -> str:
    return "tanh" if tanh else "none"

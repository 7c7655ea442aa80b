"""gelu(x + bias) in plain PyTorch."""

import torch
import torch.nn.functional as F


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None, approximate: str = "tanh") -> torch.Tensor:
    """gelu(x + bias), computed in fp32 (fp64 for fp64) and rounded once to x.dtype."""
    u = _wide(x) if bias is None else _wide(x) + _wide(bias)
    return F.gelu(u, approximate=approximate).to(x.dtype)


def bias_gelu_forward(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What torch.ops.fused_megatron.bias_gelu_forward computes."""
    return bias_gelu(x, bias)


def bias_gelu_backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What torch.ops.fused_megatron.bias_gelu_backward computes: (dx, dbias); dbias is empty without a bias."""
    u = _wide(x) if bias is None else _wide(x) + _wide(bias)
    du = torch.ops.aten.gelu_backward(_wide(dy), u, approximate="tanh")
    dbias = x.new_empty(0) if bias is None else du.sum(dim=tuple(range(du.dim() - 1))).to(bias.dtype)
    return du.to(x.dtype), dbias


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()

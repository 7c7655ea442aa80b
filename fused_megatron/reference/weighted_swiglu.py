"""silu(gate) * up * weight in plain PyTorch."""

import torch
import torch.nn.functional as F

from fused_megatron.reference.precision import widen


def weighted_swiglu_forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute torch.ops.fused_megatron.weighted_swiglu_forward: in fp32 (fp64 for fp64), rounded once to x.dtype."""
    gate, up = widen(x).chunk(2, dim=1)
    return (F.silu(gate) * up * weight.unsqueeze(1)).to(x.dtype)


def weighted_swiglu_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_y: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute torch.ops.fused_megatron.weighted_swiglu_backward: (dx, dweight, y); y is empty where not needed."""
    gate, up = widen(x).chunk(2, dim=1)
    dy = widen(dy)
    of_row = weight.unsqueeze(1)
    silu = F.silu(gate)
    dgate = torch.ops.aten.silu_backward(dy * up * of_row, gate)
    dx = torch.cat([dgate, dy * silu * of_row], dim=1).to(x.dtype)
    dweight = (dy * silu * up).sum(dim=1).to(weight.dtype)
    return dx, dweight, (silu * up * of_row).to(x.dtype) if need_y else x.new_empty(0)

"""silu(x1 + b1) * (x2 + b2) in plain PyTorch."""

import torch
import torch.nn.functional as F

from fused_megatron.reference import activation


def bias_swiglu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return silu(x1 + b1) * (x2 + b2), computed in fp32 (fp64 for fp64) and rounded once to x.dtype."""
    return activation.forward(x, bias, F.silu, gated=True)


def bias_swiglu_forward(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute torch.ops.fused_megatron.bias_swiglu_forward."""
    return bias_swiglu(x.contiguous(), bias)


def bias_swiglu_backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, need_dx: bool, need_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute torch.ops.fused_megatron.bias_swiglu_backward: (dx, dbias), empty where not needed."""
    return activation.backward(dy, x, bias, F.silu, torch.ops.aten.silu_backward, need_dx, need_dbias, gated=True)

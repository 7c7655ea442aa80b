"""gelu(x1 + b1) * (x2 + b2) in plain PyTorch."""

import functools

import torch
import torch.nn.functional as F

from fused_megatron.reference import activation


def bias_geglu(x: torch.Tensor, bias: torch.Tensor | None, approximate: str = "tanh") -> torch.Tensor:
    """Return gelu(x1 + b1) * (x2 + b2), computed in fp32 (fp64 for fp64) and rounded once to x.dtype."""
    return activation.forward(x, bias, functools.partial(F.gelu, approximate=approximate), gated=True)


def bias_geglu_forward(x: torch.Tensor, bias: torch.Tensor | None, tanh: bool) -> torch.Tensor:
    """Compute torch.ops.fused_megatron.bias_geglu_forward."""
    return bias_geglu(x.contiguous(), bias, _approximate(tanh))


def bias_geglu_backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, tanh: bool, need_dx: bool, need_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute torch.ops.fused_megatron.bias_geglu_backward: (dx, dbias), empty where not needed."""
    approximate = _approximate(tanh)
    gelu = functools.partial(F.gelu, approximate=approximate)
    gelu_backward = functools.partial(torch.ops.aten.gelu_backward, approximate=approximate)
    return activation.backward(dy, x, bias, gelu, gelu_backward, need_dx, need_dbias, gated=True)


def _approximate(tanh: bool) -> str:
    return "tanh" if tanh else "none"

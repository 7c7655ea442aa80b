"""gelu(x + bias) in plain PyTorch."""

import functools

import torch
import torch.nn.functional as F

from fused_megatron.reference import activation


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None, approximate: str = "tanh") -> torch.Tensor:
    """Return gelu(x + bias), computed in fp32 (fp64 for fp64) and rounded once to x.dtype."""
    return activation.forward(x, bias, functools.partial(F.gelu, approximate=approximate), gated=False)


def bias_gelu_forward(x: torch.Tensor, bias: torch.Tensor | None, tanh: bool) -> torch.Tensor:
    """Compute torch.ops.fused_megatron.bias_gelu_forward."""
    return bias_gelu(x.contiguous(), bias, _approximate(tanh))


def bias_gelu_backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, tanh: bool, need_dx: bool, need_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute torch.ops.fused_megatron.bias_gelu_backward: (dx, dbias), empty where not needed."""
    approximate = _approximate(tanh)
    gelu = functools.partial(F.gelu, approximate=approximate)
    gelu_backward = functools.partial(torch.ops.aten.gelu_backward, approximate=approximate)
    return activation.backward(dy, x, bias, gelu, gelu_backward, need_dx, need_dbias, gated=False)


def _approximate(tanh: bool) -> str:
    return "tanh" if tanh else "none"

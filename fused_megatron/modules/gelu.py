"""GELU: a drop-in for torch.nn.GELU."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fused_megatron import ops


class GELU(torch.nn.GELU):
    """torch.nn.GELU on the fused op: same signature and default, approximate="none" (or "tanh").

    Communication, Memory, Numerics: as fused_megatron.ops.bias_gelu without a bias. The gradient cannot be
    differentiated again (except in float64).
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply GELU to input [..., F] of any floating dtype; returns the same shape and dtype, contiguous."""
        if input.dim() == 0:
            return super().forward(input)
        return ops.bias_gelu(input, approximate=self.approximate)


def gelu_of(module: nn.Module) -> str | None:
    """Return the `approximate` with which GELU computes the same as a model's own activation; None if there is none.

    The class name does not matter: values and gradients are compared over the range where GELU is neither 0 nor the
    identity.
    """
    x = torch.linspace(-6, 6, 97, dtype=torch.float32, device="cpu")
    try:
        results = [_with_gradient(module, x)]
    except Exception:  # a foreign forward may raise anything: the module is not replaced
        return None
    for approximate in ("none", "tanh"):
        results.append(_with_gradient(lambda y, a=approximate: F.gelu(y, approximate=a), x))
        # The two approximations differ by 5e-4, two orders of the same float32 operations by 1e-6.
        if results[0].shape == results[-1].shape and bool((results[0] - results[-1]).abs().max() < 1e-5):
            return approximate
    return None


def _with_gradient(function: Any, x: torch.Tensor) -> torch.Tensor:
    """Return [values, gradients] stacked."""
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        y = function(leaf)
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
    return torch.stack([y.detach(), gradient])

"""GELU: a drop-in for torch.nn.GELU."""

import torch

from fused_megatron import ops


class GELU(torch.nn.GELU):
    """torch.nn.GELU on the fused op: same signature and default, approximate="none" (or "tanh").

    Communication, Memory, Numerics: as fused_megatron.ops.bias_gelu without a bias. The gradient cannot be
    differentiated again (except in float64).
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., F] in any floating dtype; returns the same shape and dtype, contiguous."""
        if input.dim() == 0:
            return super().forward(input)
        return ops.bias_gelu(input, approximate=self.approximate)

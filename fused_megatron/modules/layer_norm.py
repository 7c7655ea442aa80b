"""LayerNorm: a drop-in for torch.nn.LayerNorm."""

import torch

from fused_megatron import ops
from fused_megatron.checks import InputError


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm on the fused op: same signature, defaults, initial values and state_dict.

    The arguments are the same as for torch.nn.LayerNorm: normalized_shape, eps=1e-5, elementwise_affine=True,
    bias=True, device=None, dtype=None. A normalized_shape of several dims is normalised as one dim of their product.

    Communication, Memory, Numerics: as fused_megatron.ops.layer_norm.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise input [*, *normalized_shape] (any floating dtype); returns the same shape and dtype.

        Raises:
            InputError: the last dims of input are not normalized_shape.
        """
        shape = self.normalized_shape
        if tuple(input.shape[-len(shape) :]) != shape:
            raise InputError(f"input.shape={tuple(input.shape)} must end in normalized_shape={shape}")
        if len(shape) == 1:
            return ops.layer_norm(input, self.weight, self.bias, self.eps)
        weight = None if self.weight is None else self.weight.flatten()
        bias = None if self.bias is None else self.bias.flatten()
        return ops.layer_norm(input.flatten(-len(shape)), weight, bias, self.eps).view(input.shape)

"""RMSNorm: a drop-in for torch.nn.RMSNorm."""

import torch

from fused_megatron import ops
from fused_megatron.checks import InputError


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm on the fused op: same signature, defaults, initial values and state_dict.

    The arguments are the same as for torch.nn.RMSNorm: normalized_shape, eps=None, elementwise_affine=True,
    device=None, dtype=None. A normalized_shape of several dims is normalised as one dim of their product.

    Communication, Memory, Numerics: as fused_megatron.ops.rms_norm.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [*, *normalized_shape] (any floating dtype); returns the same shape and dtype.

        Raises:
            InputError: the last dims of x are not normalized_shape.
        """
        shape = self.normalized_shape
        if tuple(x.shape[-len(shape) :]) != shape:
            raise InputError(f"x.shape={tuple(x.shape)} must end in normalized_shape={shape}")
        if len(shape) == 1:
            return ops.rms_norm(x, self.weight, self.eps)
        weight = None if self.weight is None else self.weight.flatten()
        return ops.rms_norm(x.flatten(-len(shape)), weight, self.eps).view(x.shape)

"""Fused gelu(x1 + b1) * (x2 + b2) with its gradients."""

import torch

from fused_megatron.ops.activation import (
    BiasActivation,
    check_activation,
    check_approximate,
    define_activation,
    has_float64,
)
from fused_megatron.ops.autograd_function import is_differentiated
from fused_megatron.reference import bias_geglu as reference

_OPS = define_activation("bias_geglu", ", bool tanh", reference, gated=True)


def bias_geglu(x: torch.Tensor, bias: torch.Tensor | None = None, approximate: str = "tanh") -> torch.Tensor:
    """GEGLU of x + bias: GELU of the first half times the second half, in one pass over x.

    Equals gelu(u1, approximate) * u2 with u1, u2 = (x + bias).chunk(2, dim=-1):

        y[..., j] = gelu(x[..., j] + bias[j]) * (x[..., F + j] + bias[F + j])

    Args:
        x: [..., 2F] float32, bfloat16, float16 or float64; any strides (copied once if not contiguous).
        bias: [2F], any of these dtypes, or None.
        approximate: "tanh" or "none".

    Returns:
        [..., F] in the dtype of x, contiguous.

    Raises:
        InputError: the last dim of x is odd, bias is not [2F] or is on another device, or approximate has another
            value.
        TypeError: a dtype that is not floating point.

    Communication: none.

    Memory: saves x and bias for backward; x + bias and gelu(u1) are never stored.

    Numerics: float32 inside, ONE rounding to the output's dtype; dbias is summed in float32 in a fixed order, so that
    runs agree bit for bit, on the CPU with any number of threads. float64 runs on the PyTorch reference. Backward
    cannot be differentiated again (except in float64). Under autocast the output has the dtype of x, as with torch.

    Paper: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    check_approximate(approximate)
    check_activation(x, bias, gated=True)
    if has_float64(x, bias):
        return reference.bias_geglu(x.contiguous(), bias, approximate)
    if not is_differentiated():
        return _OPS.forward(x, bias, approximate == "tanh")
    return BiasActivation.apply(x, bias, _OPS, approximate == "tanh")

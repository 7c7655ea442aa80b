"""Fused silu(x1 + b1) * (x2 + b2) with its gradients."""

import torch

from fused_megatron.ops.activation import BiasActivation, check_activation, define_activation, has_float64
from fused_megatron.ops.autograd_function import is_differentiated
from fused_megatron.reference import bias_swiglu as reference

_OPS = define_activation("bias_swiglu", "", reference, gated=True)


def bias_swiglu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """SwiGLU of x + bias: SiLU of the first half times the second half, in one pass over x.

    Equals silu(u1) * u2 with u1, u2 = (x + bias).chunk(2, dim=-1), where silu(u) = u / (1 + exp(-u)):

        y[..., j] = silu(x[..., j] + bias[j]) * (x[..., F + j] + bias[F + j])

    Args:
        x: [..., 2F] float32, bfloat16, float16 or float64; any strides (copied once if not contiguous).
        bias: [2F], any of these dtypes, or None.

    Returns:
        [..., F] in the dtype of x, contiguous.

    Raises:
        InputError: the last dim of x is odd, or bias is not [2F] or is on another device.
        TypeError: a dtype that is not floating point.

    Communication: none.

    Memory: saves x and bias for backward; x + bias and silu(u1) are never stored.

    Numerics: float32 inside, ONE rounding to the output's dtype; dbias is summed in float32 in a fixed order, so that
    runs agree bit for bit, on the CPU with any number of threads. float64 runs on the PyTorch reference. Backward
    cannot be differentiated again (except in float64). Under autocast the output has the dtype of x, as with torch.

    Paper: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    check_activation(x, bias, gated=True)
    if has_float64(x, bias):
        return reference.bias_swiglu(x.contiguous(), bias)
    if not is_differentiated():
        return _OPS.forward(x, bias)
    return BiasActivation.apply(x, bias, _OPS)

"""Fused gelu(x + bias) with its gradients."""

import torch

from fused_megatron.ops.activation import (
    BiasActivation,
    check_activation,
    check_approximate,
    define_activation,
    has_float64,
)
from fused_megatron.ops.autograd_function import is_differentiated
from fused_megatron.reference import bias_gelu as reference

_OPS = define_activation("bias_gelu", ", bool tanh", reference, gated=False)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None = None, approximate: str = "tanh") -> torch.Tensor:
    """GELU of x + bias in one pass over x.

    Equals torch.nn.functional.gelu(x + bias, approximate=approximate). With u = x + bias:

        "tanh":  y = u / 2 * (1 + tanh(sqrt(2 / pi) * (u + 0.044715 u^3)))
        "none":  y = u / 2 * (1 + erf(u / sqrt(2)))

    Args:
        x: [..., F] float32, bfloat16, float16 or float64; any strides (copied once if not contiguous).
        bias: [F], any of these dtypes, or None.
        approximate: "tanh" or "none".

    Returns:
        [..., F] in the dtype of x, contiguous.

    Raises:
        InputError: bias is not [F] or is on another device, or approximate has another value.
        TypeError: a dtype that is not floating point.

    Communication: none.

    Memory: saves x and bias for backward; x + bias is never stored.

    Numerics: float32 inside, ONE rounding to the output's dtype; dbias is summed in float32 in a fixed order, so that
    runs agree bit for bit, on the CPU with any number of threads. float64 runs on the PyTorch reference. Backward
    cannot be differentiated again (except in float64). Under autocast the output has the dtype of x, as with torch.

    Paper: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv:1606.08415.
    """
    check_approximate(approximate)
    check_activation(x, bias, gated=False)
    if has_float64(x, bias):
        return reference.bias_gelu(x.contiguous(), bias, approximate)
    if not is_differentiated():
        return _OPS.forward(x, bias, approximate == "tanh")
    return BiasActivation.apply(x, bias, _OPS, approximate == "tanh")

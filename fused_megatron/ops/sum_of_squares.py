"""Sum of squares over a list of tensors, for gradient norms."""

from collections.abc import Sequence

import torch

from fused_megatron.checks import check_dtype, check_same_device
from fused_megatron.ops.registration import FLOAT_DTYPES, define_op
from fused_megatron.reference.sum_of_squares import sum_of_squares as reference

_sum = define_op(
    "sum_of_squares(Tensor[] tensors) -> Tensor",
    reference=reference,
    fake=lambda tensors: tensors[0].new_empty((), dtype=torch.float64),
)


@torch.no_grad()
def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares of all elements of all tensors: a 0-dim float64 tensor on their device.

    Args:
        tensors: of any shapes and strides, on one device: float32 (one pass in a compiled kernel), float64, bfloat16
            or float16 (plain PyTorch). No tensors: 0 on the CPU.

    Raises:
        InputError, TypeError: tensors on several devices, or of another dtype.

    Memory: 8 bytes for each 8,192 float32 elements on a GPU; a copy of a tensor that is not contiguous, or not float32.
    Numerics: squares of float32 are exact in float64, and are added in float64 in an order that depends only on the
        sizes of the tensors: two calls give the same bits. Cut otherwise, the same elements give a sum that differs by
        about 1e-16 of it, which float32 does not show. No gradient flows through it.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    for i, tensor in enumerate(tensors):
        check_dtype(f"tensors[{i}]", tensor, FLOAT_DTYPES)
        check_same_device(f"tensors[{i}]", tensor, "tensors[0]", tensors[0])
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        return reference(tensors)
    result: torch.Tensor = _sum([tensor.contiguous() for tensor in tensors])
    return result

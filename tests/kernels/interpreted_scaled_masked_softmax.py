"""scaled_masked_softmax of more than 2^31 elements; tests/audit/test_interpreted_kernels.py runs it interpreted."""

import torch

from fused_megatron.audit.triton_interpreter import interpreter
from fused_megatron.kernels import scaled_masked_softmax as kernels
from fused_megatron.reference import scaled_masked_softmax as reference

ROWS = 8  # the elements of the last programs; the pages of all others are never touched


def enormous(values: torch.Tensor) -> torch.Tensor:
    """Return [2^21 + 8, 1024], uninitialised except for the end."""
    x = torch.empty(2**21 + ROWS, values.shape[1], dtype=values.dtype)
    x[-ROWS:] = values
    return x


def test_more_than_2_31_elements() -> None:
    torch.manual_seed(0)
    x, dy = (torch.randn(ROWS, 1024).bfloat16() for _ in range(2))
    with interpreter(last_programs=ROWS // (kernels._ELEMENTS // 1024)):
        y = kernels.scaled_masked_softmax_forward(enormous(x), None, 0.5, True, 100)[-ROWS:]
    expected = reference.scaled_masked_softmax_forward(x, None, 0.5, True, 100)
    torch.testing.assert_close(y, expected)
    with interpreter(last_programs=ROWS // (kernels._ELEMENTS // 1024)):
        dx = kernels.scaled_masked_softmax_backward(enormous(dy), enormous(y), 0.5, True, 100)[-ROWS:]
    torch.testing.assert_close(dx, reference.scaled_masked_softmax_backward(dy, expected, 0.5, True, 100))

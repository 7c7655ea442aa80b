"""Tolerances for results of several ranks against a float64 reference, with their reasons."""

import torch

from fused_megatron.testing.tolerances import assert_close_to_reference

# Relative to the largest value: sums of a few thousand float32 products, in an order that depends on the ranks.
FLOAT32 = 1e-5
# In low precision: twice the error of torch's own op in that precision.
LOW_PRECISION_FACTOR = 2.0
# But a sum over R ranks rounds R partial sums and R - 1 additions. Their variances add up to 1 + (2 + .. + R) / R
# roundings of the result: 1.4 times the error of one rounding for R = 2, 1.8 for R = 4. The slack covers other shapes.
SUM_SLACK = 1.4


def assert_close(
    name: str, actual: torch.Tensor, expected: torch.Tensor, torch_result: torch.Tensor | None = None, *, ranks: int = 1
) -> None:
    """Assert that actual is close to a float64 reference; bfloat16 and float16 relative to the error of torch's result.

    Args:
        name: name of the result, for the message.
        actual: any float dtype.
        expected: float64, same shape.
        torch_result: torch's result in the dtype of actual on one rank; needed for bfloat16 and float16.
        ranks: number of ranks over which actual was summed.

    Raises:
        AssertionError: with the error and the allowed error.
    """
    if actual.dtype in (torch.float32, torch.float64):
        ulps = FLOAT32 / torch.finfo(actual.dtype).eps
        assert_close_to_reference(actual, expected, floor_ulps=ulps, name=name)
        return
    assert torch_result is not None and torch_result.dtype == actual.dtype
    roundings = 1 + sum(range(2, ranks + 1)) / ranks
    factor = max(LOW_PRECISION_FACTOR, SUM_SLACK * roundings**0.5)
    assert_close_to_reference(actual, expected, torch_result, factor=factor, name=name)

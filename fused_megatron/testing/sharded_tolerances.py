"""How far the result of several ranks may lie from a float64 reference, and why."""

import torch

from fused_megatron.testing.tolerances import assert_close_to_reference

# Relative to the largest value: sums of a few thousand float32 products in the order that the ranks make of them.
FLOAT32 = 1e-5
# Low precision: twice the error of torch's own op in that precision ..
LOW_PRECISION_FACTOR = 2.0
# .. but a sum over R ranks rounds R partial sums and R - 1 additions, whose variances add up to 1 + (2 + .. + R) / R
# roundings of the result: 1.4 times the error of one for R = 2, 1.8 for 4; and this on top for the other shapes.
SUM_SLACK = 1.4


def assert_close(
    name: str, actual: torch.Tensor, expected: torch.Tensor, torch_result: torch.Tensor | None = None, *, ranks: int = 1
) -> None:
    """Compare with a float64 reference; for bfloat16 and float16 by the error of torch's own result beside it.

    Args:
        name: what it is, for the message.
        actual: any float dtype.
        expected: float64, same shape.
        torch_result: what torch gives in the dtype of actual on one rank; for bfloat16 and float16.
        ranks: over how many ranks it was summed.

    Raises:
        AssertionError: with the error and what was allowed.
    """
    if actual.dtype in (torch.float32, torch.float64):
        ulps = FLOAT32 / torch.finfo(actual.dtype).eps
        assert_close_to_reference(actual, expected, floor_ulps=ulps, name=name)
        return
    assert torch_result is not None and torch_result.dtype == actual.dtype
    roundings = 1 + sum(range(2, ranks + 1)) / ranks
    factor = max(LOW_PRECISION_FACTOR, SUM_SLACK * roundings**0.5)
    assert_close_to_reference(actual, expected, torch_result, factor=factor, name=name)

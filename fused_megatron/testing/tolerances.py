"""How far a result may lie from a float64 reference, and why."""

import torch

# Sums of a few thousand float32 products in another order: rounding grows as sqrt(n) * 6e-8.
FLOAT32 = 1e-5
# Low precision: twice the error of torch's own op in that precision.
LOW_PRECISION_RATIO = 2.0
# A sum over R ranks in low precision rounds R partial sums and R - 1 additions, whose variances add up to
# 1 + (2 + .. + R) / R roundings of the result: 1.4 times the error of one for R = 2, 1.8 for 4, and this on top for
# the other shapes of the products.
SUM_SLACK = 1.4


def assert_close(
    name: str, actual: torch.Tensor, expected: torch.Tensor, torch_result: torch.Tensor | None = None, *, ranks: int = 1
) -> None:
    """Compare with a float64 reference; for bfloat16 and float16 by the error of torch's own result beside it.

    Args:
        name: what it is, for the message.
        actual: any float dtype.
        expected: float64, same shape.
        torch_result: what torch gives in the dtype of actual; needed for bfloat16 and float16.
        ranks: over how many ranks it was summed.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{name}: not finite"
    if actual.numel() == 0:
        return
    difference = actual.double() - expected
    if actual.dtype in (torch.float32, torch.float64):
        error, allowed = float(difference.abs().max()), FLOAT32 * float(expected.abs().max())
    else:
        assert torch_result is not None and torch_result.dtype == actual.dtype
        roundings = 1 + sum(range(2, ranks + 1)) / ranks
        ratio = max(LOW_PRECISION_RATIO, SUM_SLACK * roundings**0.5)
        error, allowed = _rms(difference), ratio * _rms(torch_result.double() - expected)
    assert error <= allowed, f"{name}: error {error:.3g} above {allowed:.3g}"


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())

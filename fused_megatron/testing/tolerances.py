"""Tolerances of the tests, with their reasons."""

import torch

# Allowed error if the yardstick is exact, in units in the last place of the largest value. A 16-bit result is rounded
# once (half a unit; one unit if a tie is broken differently). A float32 result is a sum or a quotient in any order of
# operations: a few roundings.
FLOOR_ULPS = {torch.float32: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0, torch.float64: 16.0}


def assert_close_to_reference(
    actual: torch.Tensor,
    exact: torch.Tensor,
    yardstick: torch.Tensor | None = None,
    *,
    factor: float = 2.0,
    floor_ulps: float | None = None,
    name: str = "result",
) -> None:
    """Assert that the error of actual is at most `factor` times the error of the yardstick, plus a floor.

    An error is the largest absolute difference from `exact`. NaN and inf must be at the same indices as in `exact`; inf
    is also right where `exact` is finite but beyond the range of actual's dtype.

    Args:
        actual: any shape and float dtype; the result under test.
        exact: the same shape, float64; the right result.
        yardstick: the same shape; torch's result in the precision of actual. Beware: torch's own bfloat16 layer norm
            backward on the CPU is wrong (weight gradients of 4096 rows of ones become 512): use its float32 result,
            rounded, if torch's result may be wrong. None: only the floor is allowed.
        factor: allowed multiple of the yardstick's error.
        floor_ulps: error that is always allowed, in units of eps(actual.dtype) * max|exact|; default FLOOR_ULPS.
        name: name of the result, for the message.

    Raises:
        AssertionError: with the error, the allowed error, and the values.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(exact.shape)}"
    assert exact.dtype == torch.float64, "exact must be float64"
    got = actual.detach().double().cpu()
    want = exact.detach().cpu().to(actual.dtype).double()  # inf beyond the range of the dtype
    finite = want.isfinite()
    assert torch.equal(got[~finite].isnan(), want[~finite].isnan()), f"{name}: NaN in other places"
    infinite = ~finite & ~want.isnan()
    assert torch.equal(got[infinite], want[infinite]), f"{name}: inf in other places"
    assert got[finite].isfinite().all(), f"{name}: {(~got[finite].isfinite()).sum()} values are not finite"
    if not finite.any():
        return
    want = exact.detach().cpu()[finite]
    error = (got[finite] - want).abs()
    allowed = FLOOR_ULPS[actual.dtype] if floor_ulps is None else floor_ulps
    allowed *= torch.finfo(actual.dtype).eps * want.abs().max().item()
    if yardstick is not None:
        theirs = yardstick.detach().double().cpu()[finite]
        allowed += factor * (theirs - want).abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    worst = error.max().item()
    assert worst <= allowed, (
        f"{name}: error {worst:.3e} exceeds {allowed:.3e} (got {got[finite][error.argmax()].item():.9g},"
        f" wanted {want[error.argmax()].item():.9g})"
    )

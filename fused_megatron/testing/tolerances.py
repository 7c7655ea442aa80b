"""How close is close enough: every tolerance of the tests, with its reason."""

import torch

# Units in the last place of the largest value that a result may be off even where the yardstick is exact. A 16-bit
# result is rounded once (half a unit, one with a tie broken otherwise). A float32 result is a sum or a quotient whose
# order of operations is ours to choose: a few roundings.
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
    """Assert that the error of actual is at most `factor` times the error that the yardstick makes.

    Errors are the largest absolute difference from `exact`. NaN and inf must stand where exact has them (where exact,
    being float64, is finite but beyond the range of actual's dtype, inf is right).

    Args:
        actual: any shape and float dtype: what is tested.
        exact: the same shape, float64: the right result.
        yardstick: the same shape: the same op done by torch in the precision of actual. Beware: torch's own bfloat16
            layer norm backward on the CPU is wrong (weight gradients of 4096 rows of ones come out as 512); take its
            float32 result, rounded, where a yardstick may be broken. None: the floor alone counts.
        factor: how many times the yardstick's error is allowed.
        floor_ulps: what is allowed anyway, in units of eps(actual.dtype) * max|exact|; FLOOR_ULPS by default.
        name: for the message.

    Raises:
        AssertionError: with the error, what was allowed and where.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(exact.shape)}"
    assert exact.dtype == torch.float64, "exact must be float64"
    got = actual.detach().double().cpu()
    want = exact.detach().cpu().to(actual.dtype).double()  # inf where the dtype cannot hold it
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

"""Start here when a comparison with float64 accepts a wrong result."""

import pytest
import torch

from fused_megatron.testing.tolerances import assert_close_to_reference

EXACT = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)


def off(by, dtype=torch.float32):
    return (EXACT + by).to(dtype)


def test_accepts_twice_the_error_of_the_yardstick():
    assert_close_to_reference(off(1.9e-3), EXACT, off(1e-3))
    with pytest.raises(AssertionError, match="y: error"):
        assert_close_to_reference(off(2.1e-3), EXACT, off(1e-3), name="y")


def test_accepts_one_rounding_without_a_yardstick():
    exact = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_close_to_reference(exact.to(dtype), exact)
    with pytest.raises(AssertionError):
        assert_close_to_reference(exact.bfloat16().float(), exact)


def test_nan_and_inf_must_be_at_the_same_indices():
    nan = torch.tensor([float("nan"), 1.0], dtype=torch.float64)
    inf = torch.tensor([float("inf"), 1.0], dtype=torch.float64)
    assert_close_to_reference(nan.float(), nan)
    assert_close_to_reference(inf.float(), inf)
    assert_close_to_reference(torch.tensor([float("inf")]).half(), torch.tensor([1e6], dtype=torch.float64))
    for actual, exact in (
        (nan, inf),
        (inf, nan),
        (-inf, inf),
        (nan, torch.ones_like(nan)),
        (inf, torch.ones_like(inf)),
    ):
        with pytest.raises(AssertionError):
            assert_close_to_reference(actual.float(), exact)
    with pytest.raises(AssertionError):
        assert_close_to_reference(torch.ones(2), nan)


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_reference(torch.ones(3, 1), EXACT)

"""Start here when a tolerance for results of several ranks is too wide or too narrow."""

import pytest
import torch

from fused_megatron.testing import assert_close

EXACT = torch.linspace(1, 2, 100, dtype=torch.float64)


def test_float32_is_relative_to_the_largest_value():
    assert_close("x", (EXACT + 1.9e-5).float(), EXACT)
    with pytest.raises(AssertionError, match="x: error"):
        assert_close("x", (EXACT + 2.2e-5).float(), EXACT)
    with pytest.raises(AssertionError, match="shape"):
        assert_close("x", EXACT.float()[:1], EXACT)


def test_low_precision_is_measured_against_torch():
    yardstick = (EXACT + 0.02).bfloat16()
    for ranks, allowed in [(1, 0.045), (2, 0.045), (4, 0.055)]:
        assert_close("x", (EXACT + allowed).bfloat16(), EXACT, yardstick, ranks=ranks)
        with pytest.raises(AssertionError, match="x: error"):
            assert_close("x", (EXACT + allowed + 0.045).bfloat16(), EXACT, yardstick, ranks=ranks)

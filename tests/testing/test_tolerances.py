import pytest
import torch

from fused_megatron.testing import assert_close


def test_float32():
    expected = torch.tensor([1.0, 100.0], dtype=torch.float64)
    assert_close("x", expected.float() + 9e-4, expected)
    with pytest.raises(AssertionError, match="x: error"):
        assert_close("x", expected.float() + 2e-3, expected)
    with pytest.raises(AssertionError, match="not finite"):
        assert_close("x", torch.tensor([torch.nan, 1.0]), expected)
    with pytest.raises(AssertionError, match="shape"):
        assert_close("x", expected.float()[:1], expected)


def test_low_precision_is_measured_against_torch():
    expected = torch.linspace(1, 2, 100, dtype=torch.float64)
    torch_result = expected.bfloat16()
    assert_close("x", expected.bfloat16(), expected, torch_result)
    with pytest.raises(AssertionError, match="x: error"):
        assert_close("x", (expected + 0.02).bfloat16(), expected, torch_result)

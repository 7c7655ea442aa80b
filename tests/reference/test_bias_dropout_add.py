"""Start here when bias_dropout_add goes wrong without the compiled library."""

import pytest
import torch

from fused_megatron.reference import bias_dropout_add as reference
from fused_megatron.reference.philox import keep_mask, keep_scale

RNG_STATE = torch.tensor([12345678901234567, 42])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_forward_and_backward_are_the_formula(p, has_bias, dtype):
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (torch.randn(3, 4, 9, generator=generator).to(dtype) for _ in range(3))
    bias = torch.randn(9, generator=generator).to(dtype) if has_bias else None
    keep = keep_mask(RNG_STATE, torch.arange(3 * 4 * 9).reshape(3, 4, 9), p) if p < 1.0 else torch.zeros(3, 4, 9)
    factor = keep.double() * keep_scale(p)
    exact_y = residual.double() + (x.double() + (0.0 if bias is None else bias.double())) * factor
    rng_state = RNG_STATE if 0.0 < p < 1.0 else None
    y = reference.bias_dropout_add_forward(x, bias, residual, rng_state, p, *reference.WHOLE)
    dx, dbias = reference.bias_dropout_add_backward(
        dy, bias, rng_state, dtype, p, *reference.WHOLE, need_dx=True, need_dbias=has_bias
    )
    tolerance = {"rtol": 8e-3, "atol": 8e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), exact_y, **tolerance)
    torch.testing.assert_close(dx.double(), dy.double() * factor, **tolerance)
    assert y.dtype == dx.dtype == dtype
    if has_bias:
        torch.testing.assert_close(dbias.double(), (dy.double() * factor).sum((0, 1)), **tolerance)
        assert dbias.dtype == dtype


def test_global_indices_of_a_slice():
    whole = torch.arange(5 * 6 * 7).reshape(5, 6, 7)
    part = whole[1:3, 2:6, 3:7]
    rows = (4, 1 * 42 + 2 * 7 + 3, 42, 7)
    assert torch.equal(reference.global_indices(part.shape, rows, part.device), part)
    assert torch.equal(reference.global_indices(whole.shape, reference.WHOLE, whole.device), whole)


def test_what_is_not_needed_is_empty():
    dy, bias = torch.randn(3, 5), torch.randn(5)
    results = reference.bias_dropout_add_backward(
        dy, bias, RNG_STATE, torch.float32, 0.1, *reference.WHOLE, need_dx=False, need_dbias=False
    )
    assert all(g.numel() == 0 for g in results)

"""Start here when scaled_masked_softmax goes wrong without the compiled library."""

import pytest
import torch

from fused_megatron.reference import scaled_masked_softmax as reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [(False, 0), (True, 0), (True, 2)])
@pytest.mark.parametrize("has_mask", [True, False])
def test_forward_and_backward_equal_torch(has_mask, form, dtype):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 4, 6, generator=generator).to(dtype) for _ in range(2))
    mask = (torch.rand(4, 6, generator=generator) < 0.3) if has_mask else None
    hidden = torch.zeros(4, 6, dtype=torch.bool) if mask is None else mask.clone()
    causal, window = form
    for i in range(4):
        for j in range(6):
            last = i + 6 - 4
            hidden[i, j] |= causal and (j > last or (window > 0 and j <= last - window))
    has_key = ~hidden.all(-1, keepdim=True)
    leaf = x.double().requires_grad_()
    exact = torch.softmax((leaf * 0.3).masked_fill(hidden & has_key, -torch.inf), -1) * has_key
    (exact_dx,) = torch.autograd.grad(exact, leaf, dy.double())
    y = reference.scaled_masked_softmax_forward(x, mask, 0.3, causal, window)
    dx = reference.scaled_masked_softmax_backward(dy, y, 0.3, causal, window)
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-7}
    assert y.dtype == dx.dtype == dtype
    torch.testing.assert_close(y.double(), exact, **tolerance)
    torch.testing.assert_close(dx.double(), exact_dx, **tolerance)


def test_double_backward_in_float64():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def softmax(x):
        return reference.scaled_masked_softmax_forward(x, None, 0.5, True, 3)

    torch.autograd.gradgradcheck(softmax, x)

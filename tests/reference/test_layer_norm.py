"""Start here when layer_norm goes wrong without the compiled library."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.reference import layer_norm as reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_forward_and_backward_equal_torch(has_weight, has_bias, dtype):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(3, 4, 9, generator=generator).to(dtype) for _ in range(2))
    weight, bias = (
        torch.randn(9, generator=generator).to(dtype) if present else None for present in (has_weight, has_bias)
    )
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    exact_y = F.layer_norm(leaves[0], (9,), leaves[1], leaves[2], 1e-5)
    exact = torch.autograd.grad(exact_y, [t for t in leaves if t is not None], dy.double())
    y, mean, rstd, _ = reference.layer_norm_forward(x, weight, bias, 1e-5)
    grads = reference.layer_norm_backward(dy, x, weight, bias, mean, rstd, True, has_weight, has_bias)
    tolerance = {"rtol": 8e-3, "atol": 8e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), exact_y, **tolerance)
    for grad, want in zip([g for g in grads if g.numel()], exact, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), want, **tolerance)


def test_what_is_not_needed_is_empty():
    x, weight = torch.randn(3, 5), torch.randn(5)
    _, mean, rstd, _ = reference.layer_norm_forward(x, weight, weight, 1e-5)
    grads = reference.layer_norm_backward(x, x, weight, weight, mean, rstd, False, False, False)
    assert all(g.numel() == 0 for g in grads)

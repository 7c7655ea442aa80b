"""Start here when bias_gelu goes wrong without the compiled library."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.reference import bias_gelu as reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("tanh", [True, False])
def test_forward_and_backward_equal_torch(tanh, has_bias, dtype):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(3, 4, 9, generator=generator).to(dtype) for _ in range(2))
    bias = torch.randn(9, generator=generator).to(dtype) if has_bias else None
    leaves = [t.double().requires_grad_() for t in (x, bias) if t is not None]
    exact_y = F.gelu(sum(leaves), approximate="tanh" if tanh else "none")
    exact = torch.autograd.grad(exact_y, leaves, dy.double())
    y = reference.bias_gelu_forward(x, bias, tanh)
    grads = reference.bias_gelu_backward(dy, x, bias, tanh, True, has_bias)
    tolerance = {"rtol": 8e-3, "atol": 8e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), exact_y, **tolerance)
    for grad, want in zip([g for g in grads if g.numel()], exact, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), want, **tolerance)


def test_what_is_not_needed_is_empty():
    x, bias = torch.randn(3, 5), torch.randn(5)
    assert all(g.numel() == 0 for g in reference.bias_gelu_backward(x, x, bias, True, False, False))

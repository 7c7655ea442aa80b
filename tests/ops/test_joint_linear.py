"""Start here when gate and up of a fused MLP are wrong, or their gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.ops.joint_linear import joint_linear
from fused_megatron.ops.product import product


def weights_of(together, dtype=torch.float32, sizes=(7, 4, 5)):
    """Return weights [O, 3]: rows of one matrix, or each in memory of its own."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(sum(sizes), 3, generator=generator).to(dtype).split(sizes)
    return [(part if together else part.clone()).requires_grad_() for part in parts]


def trained(function, x, weights, dy):
    """Return the result and all gradients."""
    leaf = x.clone().requires_grad_()
    for weight in weights:
        weight.grad = None
    y = function(leaf, weights)
    y.backward(dy)
    return [y.detach(), leaf.grad, *(weight.grad.clone() for weight in weights)]


def separate(x, weights):
    return torch.cat([F.linear(x, weight) for weight in weights], -1)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3,), (6, 3), (2, 5, 3), (0, 3)])
def test_equals_linears_side_by_side(shape, dtype, together):
    torch.manual_seed(1)
    x, weights = torch.randn(shape).to(dtype), weights_of(together, dtype)
    dy = torch.randn(*shape[:-1], 16).to(dtype)
    exact = trained(separate, x.double(), [w.detach().double().requires_grad_() for w in weights], dy.double())
    theirs, ours = trained(separate, x, weights, dy), trained(joint_linear, x, weights, dy)
    for a, b, true in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        error, allowed = ((one.double() - true).norm() for one in (a, b))
        assert error <= 2 * allowed + 1e-6 * (1 + true.norm())


def test_memory_decides_the_products(monkeypatch):
    """One product forward and one for dx where the weights follow each other, else one for each."""
    calls = []
    counted = lambda *args, **more: calls.append(1) or product(*args, **more)  # noqa: E731
    monkeypatch.setattr("fused_megatron.ops.joint_linear.product", counted)
    x = torch.randn(4, 3, requires_grad=True)
    for weights, products in ((weights_of(True), (1, 2)), (weights_of(False), (3, 4))):
        calls.clear()
        y = joint_linear(x, weights)
        assert len(calls) == products[0]
        y.sum().backward()
        assert len(calls) == sum(products)
        apart = list(reversed(weights))  # adjacent, but not in this order
        torch.testing.assert_close(joint_linear(x, apart), separate(x, apart))


def test_only_what_is_needed_gets_a_gradient():
    x, weights = torch.randn(4, 3), weights_of(True)
    weights[1].requires_grad_(False)
    joint_linear(x, weights).sum().backward()
    assert [weight.grad is None for weight in weights] == [False, True, False]
    expected = torch.ones(4, 7).t() @ x
    torch.testing.assert_close(weights[0].grad, expected)
    with torch.no_grad():
        assert not joint_linear(x, weights).requires_grad


def test_autocast_casts_as_linears_do():
    x, weights = torch.randn(4, 3), weights_of(True)
    twins = copy.deepcopy([w.detach().requires_grad_() for w in weights])
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = joint_linear(x, weights), separate(x, twins)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn(4, 16).bfloat16()
    ours.backward(dy), theirs.backward(dy)
    for a, b in zip(weights, twins, strict=True):
        assert a.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, b.grad, rtol=0.02, atol=0.02)


def test_wrong_arguments():
    with pytest.raises(InputError, match="at least one weight"):
        joint_linear(torch.ones(2, 3), [])
    with pytest.raises(InputError, match=r"weights\[1\].shape=\(4, 2\) must be \[O, 3\]"):
        joint_linear(torch.ones(2, 3), [torch.ones(4, 3), torch.ones(4, 2)])
    with pytest.raises(TypeError, match=r"weights\[0\]"):
        joint_linear(torch.ones(2, 3), [torch.ones(4, 3).bfloat16()])

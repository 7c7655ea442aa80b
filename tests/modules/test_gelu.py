"""Start here when fm.modules.GELU differs from torch.nn.GELU."""

import inspect

import pytest
import torch

from fused_megatron.modules import GELU, replace_modules


def test_same_signature():
    assert inspect.signature(GELU) == inspect.signature(torch.nn.GELU)
    assert repr(GELU("tanh")) == repr(torch.nn.GELU("tanh"))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0, 3)])
def test_equals_torch(shape, approximate):
    torch.manual_seed(0)
    x, dy, results = torch.randn(shape), torch.randn(shape), []
    for kind in (GELU, torch.nn.GELU):
        leaf = x.clone().requires_grad_()
        y = kind(approximate)(leaf)
        y.backward(dy)
        results.append((y, leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def quick(x):
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize(
    ("function", "approximate"),
    [
        (lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), "none"),
        (lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))), "tanh"),
        (quick, None),
        (lambda x: torch.nn.functional.gelu(x).detach().requires_grad_(), None),  # its gradient differs
        (lambda x, y: x, None),
    ],
)
def test_a_models_own_activations_are_recognised_by_their_results(function, approximate):
    class OwnGELU(torch.nn.Module):
        forward = staticmethod(function)

    model = torch.nn.Sequential(OwnGELU())
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    report = replace_modules(model)
    assert calls == [], "nobody asked the hook"
    if approximate is None:
        assert type(model[0]) is OwnGELU and "differs from torch.nn.GELU" in report.left[0].reason
    else:
        assert type(model[0]) is GELU and model[0].approximate == approximate
        x = torch.randn(3, 5)
        torch.testing.assert_close(model(x), function(x))
        assert calls == [1]

"""fm.modules.GELU stands in for torch.nn.GELU."""

import inspect

import pytest
import torch

from fused_megatron.modules import GELU


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

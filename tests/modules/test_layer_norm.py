"""Start here when fm.modules.LayerNorm or RMSNorm differs from torch.nn's."""

import inspect

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.modules import LayerNorm


def both(*args, **kwargs):
    """Return our module and torch's with the same random parameters."""
    ours, theirs = LayerNorm(*args, **kwargs), torch.nn.LayerNorm(*args, **kwargs)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_same_signature_and_state():
    assert inspect.signature(LayerNorm) == inspect.signature(torch.nn.LayerNorm)
    ours, theirs = LayerNorm(6), torch.nn.LayerNorm(6)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("normalized_shape", [7, (7,), (5, 7), (2, 5, 7)])
def test_equals_torch(normalized_shape, form, dtype):
    torch.manual_seed(0)
    ours, theirs = both(normalized_shape, **form, dtype=dtype)
    x, dy = torch.randn(2, 3, 2, 5, 7, dtype=dtype), torch.randn(2, 3, 2, 5, 7, dtype=dtype)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(dy)
        results.append([y, leaf.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_bfloat16_keeps_its_dtype():
    y = LayerNorm(8, dtype=torch.bfloat16)(torch.randn(3, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16


def test_not_contiguous_with_several_dims():
    ours, theirs = both((5, 7))
    x = torch.randn(7, 5, 3).permute(2, 1, 0)
    torch.testing.assert_close(ours(x), theirs(x))


def test_wrong_shape():
    with pytest.raises(InputError, match=r"input.shape=\(3, 4\) must end in normalized_shape=\(5,\)"):
        LayerNorm(5)(torch.zeros(3, 4))
    with pytest.raises(InputError, match="must end in"):
        LayerNorm((5, 7))(torch.zeros(7))

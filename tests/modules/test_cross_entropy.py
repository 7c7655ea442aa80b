"""Start here when fm.modules.CrossEntropyLoss differs from torch.nn.CrossEntropyLoss."""

import inspect

import pytest
import torch

from fused_megatron.modules import CrossEntropyLoss


def test_same_signature_and_state():
    assert inspect.signature(CrossEntropyLoss) == inspect.signature(torch.nn.CrossEntropyLoss)
    weight = torch.rand(5)
    ours, theirs = CrossEntropyLoss(weight), torch.nn.CrossEntropyLoss(weight)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys() == {"weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 7, 3), (2, 7, 3, 5), (0, 7)])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.3, "ignore_index": 2},
        {"weight": torch.linspace(0.5, 2, 7)},
        {"size_average": False},
    ],
    ids=str,
)
def test_equals_torch(form, shape, dtype):
    torch.manual_seed(0)
    form = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in form.items()}
    classes = shape[0] if len(shape) == 1 else shape[1]
    target = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else ())
    x = 3 * torch.randn(shape, dtype=dtype)
    results = []
    for kind in (CrossEntropyLoss, torch.nn.CrossEntropyLoss):
        leaf = x.clone().requires_grad_()
        loss = kind(**form)(leaf, target)
        upstream = torch.randn(loss.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
        loss.backward(upstream)
        results.append((loss, leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_probabilities_as_targets():
    torch.manual_seed(0)
    x, target = torch.randn(4, 7), torch.randn(4, 7).softmax(1)
    torch.testing.assert_close(CrossEntropyLoss()(x, target), torch.nn.CrossEntropyLoss()(x, target))


def test_fused_where_it_can_be():
    """Only the fused op saves no tensor of the logits' size except the logits."""
    logits, saved = torch.randn(8, 50, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        CrossEntropyLoss()(logits, torch.zeros(8, dtype=torch.long))
    large = [t for t in saved if t.numel() == logits.numel()]
    assert large and all(t.data_ptr() == logits.data_ptr() for t in large)

"""Start here when linear_cross_entropy goes wrong in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.reference.cross_entropy import LossTerms
from fused_megatron.reference.linear_cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("vocab_size", [11, 8])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}, {"softcap": 2.0}], ids=str)
def test_equals_torch(options: dict[str, Any], vocab_size: int) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(size, dtype=torch.float64, requires_grad=True) for size in [(6, 4), (11, 4), 11]
    )
    target = torch.tensor([0, 7, -100, 3, 3, 1])
    logits = F.linear(hidden, weight, bias)[:, :vocab_size]
    cap = options.get("softcap")
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(logits, target, reduction="none", label_smoothing=options.get("label_smoothing", 0.0))
    expected = expected + options.get("z_loss", 0.0) * logits.logsumexp(1).square() * (target != -100)
    loss = linear_cross_entropy(hidden, weight, bias, target, LossTerms(vocab_size, **options))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(6, dtype=torch.float64)
    gradients = [torch.autograd.grad(x, (hidden, weight, bias), upstream) for x in (loss, expected)]
    for ours, torchs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-12)


def test_sixteen_bits_are_widened_before_the_product() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 64).bfloat16(), torch.randn(9, 64).bfloat16()
    target = torch.arange(5)
    loss = linear_cross_entropy(hidden, weight, None, target, LossTerms(9))
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), target, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-5)

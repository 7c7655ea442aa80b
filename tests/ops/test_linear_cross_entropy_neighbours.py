"""Start here when bfloat16 gradients are sometimes NaN: products that read uninitialised memory."""

import pytest
import torch

import fused_megatron as fm
from fused_megatron.ops import linear_cross_entropy_tile_shape as shapes
from fused_megatron.testing.poisoned_products import PoisonedProducts

DTYPES = [torch.bfloat16, torch.float16]


def loss_and_gradients(num_tokens, vocab_size, dtype, reduction):
    torch.manual_seed(vocab_size)
    hidden = torch.randn(num_tokens, 40).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, 40) * 0.2).to(dtype).requires_grad_()
    target = torch.randint(0, vocab_size, (num_tokens,))
    loss = fm.ops.linear_cross_entropy(hidden, weight, target, reduction=reduction)
    upstream = torch.randn(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight], upstream)]


@pytest.fixture
def matrix_units(monkeypatch):
    """Compute 16-bit products as on a CPU with matrix units."""
    monkeypatch.setattr(shapes, "_CPU_HAS_MATRIX_UNITS", dict.fromkeys(DTYPES, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(
    ("num_tokens", "vocab_size"), [(64, 61), (256, 389), (64, 1001), pytest.param(256, 50257, marks=pytest.mark.slow)]
)
def test_tiles_have_no_unwritten_neighbours(matrix_units, num_tokens, vocab_size, dtype, reduction):
    check_tiles(num_tokens, vocab_size, dtype, reduction)


@pytest.mark.parametrize(("dtype", "reduction"), [(torch.bfloat16, "sum"), (torch.float16, "none")], ids=str)
def test_large_vocabularies_have_no_unwritten_neighbours(matrix_units, dtype, reduction):
    check_tiles(256, 50257, dtype, reduction)


def check_tiles(num_tokens, vocab_size, dtype, reduction):
    with PoisonedProducts() as products:
        results = loss_and_gradients(num_tokens, vocab_size, dtype, reduction)
    assert products.num_views > 0
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [61, 389, 1001])
@pytest.mark.parametrize("num_tokens", [64, 256])
def test_values_do_not_depend_on_what_freed_memory_holds(num_tokens, vocab_size, dtype):
    """On this machine's own matrix units: the memory of the tile was NaN before."""
    expected = loss_and_gradients(num_tokens, vocab_size, dtype, "mean")
    for _ in range(4):
        freed = [torch.full((num_tokens, columns), torch.nan, dtype=dtype) for columns in (vocab_size, 448, 1024)]
        del freed
        results = loss_and_gradients(num_tokens, vocab_size, dtype, "mean")
        assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))


def test_unwritten_neighbours_are_found():
    weight = torch.randn(8, 61).bfloat16()
    with PoisonedProducts():
        padded = torch.empty(8, 64, dtype=torch.bfloat16)
        padded[:, :61] = weight
        with pytest.raises(AssertionError, match="rows of 64 elements"):
            torch.mm(padded[:, :61], weight.t())
        with pytest.raises(AssertionError, match="rows of 64 elements"):
            torch.mm(padded[:, :61].t(), weight)
        padded[:, 61:] = 0
        torch.mm(padded[:, :61], weight.t())

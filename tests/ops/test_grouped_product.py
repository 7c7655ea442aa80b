"""Start here when the product of an expert, or the gradient of its weight, is wrong."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.ops.grouped_product import _ends, grouped_product, grouped_weight_gradient
from fused_megatron.ops.product import product

COUNTS = [(3, 0, 5, 1), (0, 0, 9, 0), (0, 0, 0, 0)]


def operands(counts, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    rows = sum(counts)
    shapes = {"x": (rows, 6), "weight": (len(counts), 10, 6), "grad": (rows, 10), "total": (len(counts), 10, 6)}
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS)
def test_each_group_has_its_product(counts, dtype):
    x, weight, grad, total = operands(counts, dtype)
    y, dx, dw = [], [], []
    for rows, dy, w in zip(x.split(counts), grad.split(counts), weight, strict=True):
        y.append(product(rows, w))
        dx.append(product(dy, w.t()))
        dw.append(product(dy.t(), rows.t()))
    assert torch.equal(grouped_product(x, weight, counts), torch.cat(y))
    torch.testing.assert_close(grouped_product(grad, weight, counts, transposed=True), torch.cat(dx))
    out = torch.full((len(x), 10), torch.nan, dtype=dtype)
    assert grouped_product(x, weight, counts, out=out) is out and torch.equal(out, torch.cat(y))
    torch.testing.assert_close(grouped_weight_gradient(grad, x, counts), torch.stack(dw))
    into = torch.full_like(total, torch.nan)
    assert grouped_weight_gradient(grad, x, counts, into) is into
    assert torch.equal(into, grouped_weight_gradient(grad, x, counts))
    wide = total.float().clone()
    grouped_weight_gradient(grad, x, counts, wide, accumulate=True)
    torch.testing.assert_close(wide, total.float() + into.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", COUNTS[:2])
def test_counts_on_a_device(counts):
    """The call of torch's grouped product that runs on a GPU: torch has it on the CPU, too."""
    x, weight, grad, total = operands(counts)
    weight, tensor = F.pad(weight, (0, 2)), torch.tensor(counts)
    x = F.pad(x, (0, 2))  # rows of a multiple of 16 bytes, as torch requires
    grad, wide = F.pad(grad, (0, 2)), F.pad(weight, (0, 0, 0, 2))
    torch.testing.assert_close(grouped_product(x, wide, tensor), grouped_product(x, wide, counts))
    ours = grouped_product(grad, wide, counts, transposed=True)
    torch.testing.assert_close(grouped_product(grad, wide, tensor, transposed=True), ours)
    gradient = grouped_weight_gradient(grad, x, counts)
    torch.testing.assert_close(grouped_weight_gradient(grad, x, tensor), gradient)
    total = torch.ones_like(gradient)
    grouped_weight_gradient(grad, x, tensor, total, accumulate=True)
    torch.testing.assert_close(total, gradient + 1)
    assert torch.equal(grouped_weight_gradient(grad, x, tensor, total), grouped_weight_gradient(grad, x, tensor))


@pytest.mark.parametrize("counts", [*COUNTS, (4, 4, 4)])
def test_ends_of_groups(counts):
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    for found in (_ends(counts, torch.device("cpu")), _ends(torch.tensor(counts), torch.device("cpu"))):
        assert found.dtype == torch.int32 and torch.equal(found, ends)

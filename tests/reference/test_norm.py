"""Start here when layer_norm or rms_norm goes wrong without the compiled library, or in float64."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.reference import layer_norm, rms_norm

EPS = 1e-5


def draw(dtype, stream):
    generator = torch.Generator().manual_seed(0)

    def random(*size, dtype):
        return torch.randn(size, generator=generator).to(dtype)

    x, dy = random(3, 4, 9, dtype=dtype), random(3, 4, 9, dtype=dtype)
    residual, dtotal = random(3, 4, 9, dtype=stream), random(3, 4, 9, dtype=stream)
    return x, residual, random(9, dtype=dtype), random(9, dtype=dtype), dy, dtotal


@pytest.mark.parametrize("zero_centered_weight", [False, True])
@pytest.mark.parametrize("with_dtotal", [False, True])
@pytest.mark.parametrize(
    "dtype,stream", [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("centred", [True, False])
def test_residual_forward_and_backward_equal_torch(centred, dtype, stream, with_dtotal, zero_centered_weight):
    x, residual, weight, bias, dy, dtotal = draw(dtype, stream)
    leaves = [t.double().requires_grad_() for t in (x, residual, weight, *([bias] if centred else []))]
    scale = leaves[2] + 1 if zero_centered_weight else leaves[2]
    exact_total = leaves[0] + leaves[1]
    if centred:
        exact_y = F.layer_norm(exact_total, (9,), scale, leaves[3], EPS)
    else:
        exact_y = F.rms_norm(exact_total, (9,), scale, EPS)
    outputs, upstream = ((exact_y, exact_total), (dy.double(), dtotal.double()))
    if not with_dtotal:
        upstream = (upstream[0], torch.zeros_like(upstream[1]))
    exact = torch.autograd.grad(outputs, leaves, upstream)
    dtotal = dtotal if with_dtotal else None
    if centred:
        y, *statistics, total = layer_norm.layer_norm_forward(x, weight, bias, EPS, residual, zero_centered_weight)
        dx, dweight, dbias, dresidual = layer_norm.layer_norm_backward(
            dy, total, weight, bias, *statistics, True, True, True, dtotal, True, zero_centered_weight
        )
        grads = (dx, dresidual, dweight, dbias)
    else:
        y, rstd, total = rms_norm.rms_norm_forward(x, weight, EPS, residual, zero_centered_weight)
        dx, dweight, dresidual = rms_norm.rms_norm_backward(
            dy, total, weight, rstd, True, True, dtotal, True, zero_centered_weight
        )
        grads = (dx, dresidual, dweight)
    tolerance = {"rtol": 1e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    assert total.dtype == grads[1].dtype == stream and y.dtype == grads[0].dtype == dtype
    for actual, wanted in zip((y, total, *grads), (exact_y, exact_total, *exact), strict=True):
        torch.testing.assert_close(actual.double(), wanted, **tolerance)


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rms_norm_equals_torch(dtype, has_weight):
    x, _, weight, _, dy, _ = draw(dtype, dtype)
    weight = weight if has_weight else None
    leaf = x.clone().requires_grad_()
    expected = F.rms_norm(leaf, (9,), weight, EPS)
    y, rstd, total = rms_norm.rms_norm_forward(x, weight, EPS)
    dx, dweight, dresidual = rms_norm.rms_norm_backward(dy, x, weight, rstd, True, False)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, leaf, dy)[0], rtol=1e-5, atol=1e-5)
    assert total.numel() == dweight.numel() == dresidual.numel() == 0

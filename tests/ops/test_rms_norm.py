"""fm.ops.rms_norm against float64, forward and every gradient; what it shares with layer_norm is in test_norm.py."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.ops import rms_norm
from fused_megatron.testing.tolerances import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


def inputs(shape, dtype, device="cpu", has_weight=True):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator).to(dtype).to(device)
    return x, weight if has_weight else None, dy


def run(fn, x, weight, dy, eps=EPS):
    """y and the gradients of what exists, in the order x, weight."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight)]
    y = fn(leaves[0], leaves[1], eps)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def theirs(x, weight, eps):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def check_against_float64(x, weight, dy, eps=EPS):
    exact = run(theirs, *(None if t is None else t.double() for t in (x, weight, dy)), eps)
    wide = run(theirs, *(None if t is None else t.float() for t in (x, weight, dy)), eps)
    actual = run(rms_norm, x, weight, dy, eps)
    for name, a, e, w in zip(("y", "dx", "dweight"), actual, exact, wide, strict=False):
        assert_close_to_reference(a, e, w.to(a.dtype), name=name)
    assert actual[0].dtype == x.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (64, 256), (3, 2), (9, 1023), (2, 3, 48), (100, 17), (1, 5000), (9,)])
def test_values_and_gradients(shape, dtype, device):
    check_against_float64(*inputs(shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_weight(dtype, device):
    for width in (40, 41):
        check_against_float64(*inputs((17, width), dtype, device, has_weight=False))


@pytest.mark.parametrize("scale", [1e4, 1e-4, 0.0])
def test_scales(scale, device):
    x, weight, dy = inputs((20, 513), torch.float32, device)
    check_against_float64(x * scale, weight, dy)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_eps_none_is_that_of_torch(dtype, device):
    x, weight, _ = inputs((6, 32), dtype, device)
    x = x * 1e-3  # mean squares near 1e-6: an eps of bfloat16 (8e-3) would show
    torch.testing.assert_close(rms_norm(x, weight), F.rms_norm(x, (32,), weight))


def test_eps_counts(device):
    x, weight, dy = inputs((6, 32), torch.float32, device)
    check_against_float64(x, weight, dy, eps=0.5)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_empty_batch(shape, device):
    y, dx, dweight = run(rms_norm, *inputs(shape, torch.bfloat16, device))
    assert y.shape == dx.shape == shape and not dweight.any()


def test_only_needed_gradients_are_computed(device):
    x, weight, dy = inputs((10, 16), torch.float32, device)
    rstd = torch.ops.fused_megatron.rms_norm_forward(x, weight, EPS)[1]
    full = torch.ops.fused_megatron.rms_norm_backward(dy, x, weight, rstd, True, True)
    for need in ((True, False), (False, True), (False, False)):
        some = torch.ops.fused_megatron.rms_norm_backward(dy, x, weight, rstd, *need)
        for wanted, got, value in zip(need, some, full, strict=False):
            assert torch.equal(got, value) if wanted else got.numel() == 0


def test_gradcheck_in_float64():
    arguments = [t.double().requires_grad_() for t in inputs((3, 5), torch.float32)[:2]]
    torch.autograd.gradcheck(rms_norm, arguments)
    torch.autograd.gradgradcheck(rms_norm, arguments)


def test_second_derivative_is_refused(device):
    x, weight, dy = inputs((3, 5), torch.float32, device)
    x.requires_grad_()
    dy.requires_grad_()
    (dx,) = torch.autograd.grad(rms_norm(x, weight), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("has_weight", [True, False])
def test_opcheck(has_weight):
    x, weight, dy = inputs((6, 9), torch.float32, has_weight=has_weight)
    forward, backward = (getattr(torch.ops.fused_megatron, f"rms_norm_{d}").default for d in ("forward", "backward"))
    torch.library.opcheck(forward, (x, weight, EPS))
    torch.library.opcheck(forward, (x.bfloat16().t(), None, EPS))
    torch.library.opcheck(backward, (dy, x, weight, forward(x, weight, EPS)[1], True, has_weight))


@pytest.mark.cpu_kernel
def test_compile_fullgraph():
    x, weight, dy = inputs((6, 9), torch.float32)

    def step(x, weight, eps):
        return rms_norm(x * 2, weight, eps) * 3

    expected = run(step, x, weight, dy)
    actual = run(torch.compile(step, fullgraph=True, backend="aot_eager"), x, weight, dy)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_bad_arguments():
    x = torch.zeros(3, 4)
    with pytest.raises(InputError, match=r"weight.shape=\(3,\) must be \(4,\)"):
        rms_norm(x, torch.zeros(3))
    with pytest.raises(InputError, match="last dim of at least 1"):
        rms_norm(torch.zeros(3, 0))
    with pytest.raises(InputError, match="device"):
        rms_norm(x, torch.zeros(4, device="meta"))
    with pytest.raises(TypeError, match=r"x.dtype=int64"):
        rms_norm(x.long())
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        torch.ops.fused_megatron.rms_norm_forward(x.int(), None, EPS)

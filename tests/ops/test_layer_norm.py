"""fm.ops.layer_norm against float64, forward and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.ops import layer_norm
from fused_megatron.testing.tolerances import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["weight+bias", "weight", "bias", "none"]


def inputs(shape, dtype, form="weight+bias", parameter_dtype=None, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, dtype):
        return torch.randn(*size, generator=generator).to(dtype).to(device)

    width = shape[-1]
    weight = draw(width, dtype=parameter_dtype or dtype) if "weight" in form else None
    bias = draw(width, dtype=parameter_dtype or dtype) if "bias" in form else None
    return draw(*shape, dtype=dtype), weight, bias, draw(*shape, dtype=dtype)


def run(fn, x, weight, bias, dy, eps=1e-5):
    """y and the gradients of what exists, in the order x, weight, bias."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y = fn(leaves[0], x.shape[-1:], leaves[1], leaves[2], eps)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def ours(x, normalized_shape, weight, bias, eps):
    return layer_norm(x, weight, bias, eps)


def check_against_float64(x, weight, bias, dy, eps=1e-5, **tolerance):
    double = [None if t is None else t.double() for t in (x, weight, bias, dy)]
    exact = run(F.layer_norm, *double, eps)
    # torch's own bfloat16 backward is wrong on the CPU: the yardstick is its float32 result, rounded.
    wide = [None if t is None else t.float() for t in (x, weight, bias, dy)]
    actual = run(ours, x, weight, bias, dy, eps)
    yardstick = [t.to(a.dtype) for t, a in zip(run(F.layer_norm, *wide, eps), actual, strict=True)]
    for name, a, e, z in zip(("y", "dx", "dparameter", "dparameter"), actual, exact, yardstick, strict=False):
        assert_close_to_reference(a, e, z, name=name, **tolerance)
    assert actual[0].dtype == x.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (64, 256), (3, 2), (33, 1023), (2, 3, 48), (300, 17), (1, 5000), (9,)])
def test_values_and_gradients(shape, dtype, device):
    check_against_float64(*inputs(shape, dtype, device=device))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forms(form, dtype, device):
    check_against_float64(*inputs((37, 40), dtype, form, device=device))


@pytest.mark.parametrize("parameter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_of_another_dtype(dtype, parameter_dtype, device):
    check_against_float64(*inputs((19, 33), dtype, parameter_dtype=parameter_dtype, device=device))


@pytest.mark.parametrize("offset,scale", [(1e4, 1.0), (0.0, 1e4), (-1e4, 100.0), (0.0, 1e-4)])
def test_large_mean_and_large_scale(offset, scale, device):
    x, weight, bias, dy = inputs((20, 513), torch.float32, device=device)
    check_against_float64(x * scale + offset, weight, bias, dy)


def test_constant_rows_give_the_bias(device):
    x, weight, bias, dy = inputs((6, 64), torch.float32, device=device)
    x = torch.full_like(x, 3.0)
    assert torch.equal(layer_norm(x, weight, bias), bias.expand(6, 64))
    check_against_float64(x, weight, bias, dy)


def test_rows_of_one_column(device):
    x, weight, bias, dy = inputs((5, 1), torch.float32, device=device)
    y, dx, dweight, dbias = run(ours, x, weight, bias, dy)
    assert torch.equal(y, bias.expand(5, 1)) and not dweight.any()
    torch.testing.assert_close(dbias, dy.sum(0))
    # A difference of equal numbers, times rstd = 1 / sqrt(eps) = 316.
    assert dx.abs().max() < 1e-6 * 316 * (dy * weight).abs().max()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_row(value, device):
    x, weight, bias, dy = inputs((4, 33), torch.float32, device=device)
    x[1, 7] = value
    actual, expected = run(ours, x, weight, bias, dy), run(F.layer_norm, x, weight, bias, dy)
    for a, e in zip(actual[:2], expected[:2], strict=True):
        assert torch.equal(a.isnan().all(1), torch.tensor([False, True, False, False], device=device))
        torch.testing.assert_close(a[[0, 2, 3]], e[[0, 2, 3]], rtol=1e-5, atol=1e-5)
    assert actual[2].isnan().all() and not actual[3].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_contiguous(dtype, device):
    x, weight, bias, dy = inputs((12, 5, 26), dtype, device=device)
    x, dy = x.transpose(0, 1)[..., ::2], dy.transpose(0, 1)[..., ::2]
    weight, bias = weight[::2], bias[::2]
    strided = run(ours, x, weight, bias, dy)
    packed = run(ours, x.contiguous(), weight.contiguous(), bias.contiguous(), dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))
    check_against_float64(x, weight, bias, dy)


def test_expanded_upstream_gradient(device):
    x, weight, bias, dy = inputs((8, 24), torch.float32, device=device)
    check_against_float64(x, weight, bias, dy[:1].expand(8, 24))


def test_raw_ops_take_any_strides(device):
    x, weight, _, dy = inputs((16, 24), torch.float32, device=device)
    y, mean, rstd, _ = torch.ops.fused_megatron.layer_norm_forward(x.t(), weight[:16], None, 1e-5)
    assert y.is_contiguous()
    torch.testing.assert_close(y, F.layer_norm(x.t(), (16,), weight[:16]))
    grads = torch.ops.fused_megatron.layer_norm_backward(
        dy.t(), x.t(), weight[:16], None, mean, rstd, True, True, False
    )
    exact = run(F.layer_norm, x.t().double(), weight[:16].double(), None, dy.t().double())
    assert_close_to_reference(grads[0], exact[1], floor_ulps=8)
    assert_close_to_reference(grads[1], exact[2], floor_ulps=8)
    assert grads[2].numel() == 0


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_empty_batch(shape, device):
    x, weight, bias, dy = inputs(shape, torch.bfloat16, device=device)
    y, dx, dweight, dbias = run(ours, x, weight, bias, dy)
    assert y.shape == dx.shape == shape
    assert not dweight.any() and not dbias.any()


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_equal_for_any_number_of_threads_and_again(dtype):
    arguments = inputs((500, 200), dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(run(ours, *arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_only_needed_gradients_are_computed(device):
    x, weight, bias, dy = inputs((10, 16), torch.float32, device=device)
    mean, rstd = torch.ops.fused_megatron.layer_norm_forward(x, weight, bias, 1e-5)[1:3]
    full = torch.ops.fused_megatron.layer_norm_backward(dy, x, weight, bias, mean, rstd, True, True, True)
    for need in ((True, False, False), (False, True, False), (False, False, True), (True, True, False)):
        some = torch.ops.fused_megatron.layer_norm_backward(dy, x, weight, bias, mean, rstd, *need)
        for wanted, got, value in zip(need, some, full, strict=False):
            assert torch.equal(got, value) if wanted else got.numel() == 0
    weight.requires_grad_()
    y = layer_norm(x, weight, bias)
    y.backward(dy)
    assert torch.equal(weight.grad, full[1]) and x.grad is None


def test_no_grad_equals_grad(device):
    x, weight, bias, _ = inputs((10, 16), torch.bfloat16, device=device)
    with torch.no_grad():
        y = layer_norm(x, weight, bias)
    assert torch.equal(y, layer_norm(x.requires_grad_(), weight, bias))


def test_gradcheck_in_float64():
    arguments = [t.double().requires_grad_() for t in inputs((3, 5), torch.float32)[:3]]
    torch.autograd.gradcheck(layer_norm, arguments)
    torch.autograd.gradgradcheck(layer_norm, arguments)


def test_second_derivative_is_refused(device):
    x, weight, bias, dy = inputs((3, 5), torch.float32, device=device)
    x.requires_grad_()
    dy.requires_grad_()
    (dx,) = torch.autograd.grad(layer_norm(x, weight, bias), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    x, weight, bias, dy = inputs((6, 9), torch.float32, form)
    forward, backward = (getattr(torch.ops.fused_megatron, f"layer_norm_{d}").default for d in ("forward", "backward"))
    torch.library.opcheck(forward, (x, weight, bias, 1e-5))
    torch.library.opcheck(forward, (x.bfloat16().t(), None, None, 1e-5))
    mean, rstd = forward(x, weight, bias, 1e-5)[1:3]
    torch.library.opcheck(backward, (dy, x, weight, bias, mean, rstd, True, weight is not None, bias is not None))


@pytest.mark.cpu_kernel
def test_compile_fullgraph():
    x, weight, bias, dy = inputs((6, 9), torch.float32)

    def step(x, normalized_shape, weight, bias, eps):
        return layer_norm(x * 2, weight, bias, eps) * 3

    expected = run(step, x, weight, bias, dy)
    actual = run(torch.compile(step, fullgraph=True, backend="aot_eager"), x, weight, bias, dy)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.cpu_kernel
def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 6, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(6, requires_grad=True)
        y = layer_norm(x, weight)
        y.sum().backward()
        assert y.dtype == torch.bfloat16 and x.grad.shape == (4, 6) and weight.grad.dtype == torch.float32


def test_bad_arguments():
    x = torch.zeros(3, 4)
    with pytest.raises(InputError, match=r"weight.shape=\(3,\) must be \(4,\)"):
        layer_norm(x, torch.zeros(3))
    with pytest.raises(InputError, match="last dim of at least 1"):
        layer_norm(torch.zeros(3, 0))
    with pytest.raises(InputError, match="last dim of at least 1"):
        layer_norm(torch.tensor(1.0))
    with pytest.raises(InputError, match="device"):
        layer_norm(x, torch.zeros(4, device="meta"))
    with pytest.raises(TypeError, match=r"x.dtype=int64"):
        layer_norm(x.long())
    with pytest.raises(TypeError, match=r"bias.dtype=int64"):
        layer_norm(x, None, torch.zeros(4).long())


def test_raw_ops_refuse_what_they_cannot_read():
    forward = torch.ops.fused_megatron.layer_norm_forward
    with pytest.raises(RuntimeError, match="weight must have as many elements"):
        forward(torch.zeros(3, 4), torch.zeros(3), None, 1e-5)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        forward(torch.zeros(3, 4, dtype=torch.int32), None, None, 1e-5)

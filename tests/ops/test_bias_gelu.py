"""fm.ops.bias_gelu against float64, forward and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.ops import bias_gelu
from fused_megatron.testing.tolerances import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["tanh", "none"]


def inputs(shape, dtype, has_bias=True, bias_dtype=None, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator) * scale

    bias = draw(shape[-1]).to(bias_dtype or dtype) if has_bias else None
    return draw(*shape).to(dtype), bias, draw(*shape).to(dtype)


def torch_bias_gelu(x, bias, approximate):
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def run(fn, x, bias, dy, approximate="tanh"):
    """y and the gradients of what exists, in the order x, bias."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, bias)]
    y = fn(*leaves, approximate)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def check_against_float64(x, bias, dy, approximate="tanh"):
    exact = run(torch_bias_gelu, *(None if t is None else t.double() for t in (x, bias, dy)), approximate)
    wide = run(torch_bias_gelu, *(None if t is None else t.float() for t in (x, bias, dy)), approximate)
    actual = run(bias_gelu, x, bias, dy, approximate)
    for name, a, e, z in zip(("y", "dx", "dbias"), actual, exact, wide, strict=False):
        assert_close_to_reference(a, e, z.to(a.dtype), name=name)
    assert actual[0].dtype == x.dtype


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (64, 256), (3, 1), (33, 2051), (2, 3, 48), (300, 17), (9,)])
def test_values_and_gradients(shape, dtype, approximate):
    check_against_float64(*inputs(shape, dtype), approximate)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 27), (3, 1500), (), (1,)])
def test_without_bias(shape, dtype, approximate):
    check_against_float64(*inputs(shape, dtype, has_bias=False), approximate)


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_of_another_dtype(dtype, bias_dtype):
    check_against_float64(*inputs((19, 33), dtype, bias_dtype=bias_dtype))


@pytest.mark.parametrize("approximate", FORMS)
def test_all_of_the_curve(approximate):
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([1e4, -1e4, 1e20, -1e20, 0.0, -0.0, 1e-30, -1e-40])])
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    y, dx = run(bias_gelu, x, None, dy, approximate)
    # Here an error per value: the large ones must not hide the small ones.
    exact_y, exact_dx = run(torch_bias_gelu, x[:20001].double(), None, dy[:20001].double(), approximate)
    assert (y[:20001] - exact_y).abs().max() < 2e-6
    assert ((dx[:20001] - exact_dx) / dy[:20001]).abs().max() < 2e-6
    assert torch.equal(y[20001:-1], torch.tensor([1e4, 0.0, 1e20, 0.0, 0.0, 0.0, 5e-31]))
    slopes = dx[20001:20005] / dy[20001:20005]
    torch.testing.assert_close(slopes, torch.tensor([1.0, 0.0, 1.0, 0.0]), rtol=0, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", FORMS)
def test_nan_and_inf_as_torch(dtype, approximate):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[1.0, nan, inf, -inf, -1.0]], dtype=dtype)
    actual = run(bias_gelu, x, torch.zeros(5), torch.ones_like(x), approximate)
    # What torch gives in float64 (its vectorised float32 "none" makes NaN of inf).
    expected = run(torch_bias_gelu, x.double(), torch.zeros(5).double(), torch.ones(1, 5).double(), approximate)
    assert torch.equal(expected[0].isnan(), torch.tensor([[False, True, False, True, False]]))
    for a, e in zip(actual, expected, strict=True):
        assert_close_to_reference(a, e)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_contiguous(dtype):
    x, bias, dy = inputs((12, 5, 26), dtype)
    x, dy, bias = x.transpose(0, 1)[..., ::2], dy.transpose(0, 1)[..., ::2], bias[::2]
    strided = run(bias_gelu, x, bias, dy)
    packed = run(bias_gelu, x.contiguous(), bias.contiguous(), dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))
    check_against_float64(x, bias, dy)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_empty(shape, has_bias):
    y, dx, *dbias = run(bias_gelu, *inputs(shape, torch.bfloat16, has_bias))
    assert y.shape == dx.shape == shape
    assert not any(d.any() for d in dbias)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_equal_for_any_number_of_threads_and_again(dtype):
    arguments = inputs((300, 1500), dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(run(bias_gelu, *arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_only_needed_gradients_are_computed():
    x, bias, dy = inputs((10, 16), torch.float32)
    backward = torch.ops.fused_megatron.bias_gelu_backward
    dx, dbias = backward(dy, x, bias, True, True, True)
    only_dx, nothing = backward(dy, x, bias, True, True, False)
    assert torch.equal(only_dx, dx) and nothing.numel() == 0
    nothing, only_dbias = backward(dy, x, bias, True, False, True)
    torch.testing.assert_close(only_dbias, dbias)
    assert nothing.numel() == 0
    bias.requires_grad_()
    bias_gelu(x, bias).backward(dy)
    torch.testing.assert_close(bias.grad, dbias)
    assert x.grad is None


def test_no_grad_equals_grad():
    x, bias, _ = inputs((10, 16), torch.bfloat16)
    with torch.no_grad():
        y = bias_gelu(x, bias)
    assert torch.equal(y, bias_gelu(x.requires_grad_(), bias))


@pytest.mark.parametrize("approximate", FORMS)
def test_gradcheck_in_float64(approximate):
    x, bias, _ = (t.double().requires_grad_() for t in inputs((3, 5), torch.float32))
    torch.autograd.gradcheck(lambda x, bias: bias_gelu(x, bias, approximate), (x, bias))


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("has_bias", [True, False])
def test_opcheck(has_bias):
    x, bias, dy = inputs((6, 9), torch.float32, has_bias)
    forward, backward = (getattr(torch.ops.fused_megatron, f"bias_gelu_{d}").default for d in ("forward", "backward"))
    torch.library.opcheck(forward, (x, bias, True))
    torch.library.opcheck(forward, (x.bfloat16().t(), None, False))
    torch.library.opcheck(backward, (dy, x, bias, True, True, has_bias))


@pytest.mark.cpu_kernel
def test_compile_fullgraph():
    x, bias, dy = inputs((6, 9), torch.float32)

    def step(x, bias, approximate):
        return bias_gelu(x * 2, bias, approximate) * 3

    expected = run(step, x, bias, dy)
    actual = run(torch.compile(step, fullgraph=True, backend="aot_eager"), x, bias, dy)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.cpu_kernel
def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 6, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.empty(6, requires_grad=True)
        y = bias_gelu(x, bias)
        y.sum().backward()
        assert y.dtype == torch.bfloat16 and x.grad.shape == (4, 6) and bias.grad.dtype == torch.float32


def test_bad_arguments():
    x = torch.zeros(3, 4)
    with pytest.raises(InputError, match=r"bias.shape=\(3,\) must be \(4,\)"):
        bias_gelu(x, torch.zeros(3))
    with pytest.raises(InputError, match="approximate='tahn' must be"):
        bias_gelu(x, None, "tahn")
    with pytest.raises(InputError, match="device"):
        bias_gelu(x, torch.zeros(4, device="meta"))
    with pytest.raises(InputError, match="at least 1"):
        bias_gelu(torch.tensor(1.0), torch.zeros(1))
    with pytest.raises(TypeError, match=r"x.dtype=int64"):
        bias_gelu(x.long())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (64, 256), (33, 2051), (2048, 4096)])
def test_on_a_gpu(shape, dtype, approximate):
    arguments = [t.cuda() for t in inputs(shape, dtype)]
    check_against_float64(*arguments, approximate)
    again = [run(bias_gelu, *arguments) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))

"""fm.ops.bias_geglu against float64, forward and every gradient."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.ops import bias_geglu
from fused_megatron.testing.op_gradients import assert_op_matches, output_and_gradients
from fused_megatron.testing.tolerances import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["tanh", "none"]


def inputs(shape, dtype, device, has_bias=True, bias_dtype=None, scale=2.0):
    """x [..., 2F], bias [2F] or None, dy [..., F]; shape is that of x."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator) * scale

    bias = draw(shape[-1]).to(device, bias_dtype or dtype) if has_bias else None
    return draw(*shape).to(device, dtype), bias, draw(*shape[:-1], shape[-1] // 2).to(device, dtype)


def unfused(x, bias=None, approximate="tanh"):
    gate, value = (x if bias is None else x + bias).chunk(2, -1)
    return F.gelu(gate, approximate=approximate) * value


def ours_and_unfused(approximate):
    return [functools.partial(function, approximate=approximate) for function in (bias_geglu, unfused)]


# Halves that are wide and aligned; too odd for wide accesses; the second half alone unaligned; one column; long enough
# for several blocks of columns and rows.
SHAPES = [(5, 16), (300, 528), (33, 514), (3, 2), (2, 3, 48), (90, 22), (4, 2072), (10,)]


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, approximate, device):
    x, bias, dy = inputs(shape, dtype, device)
    assert_op_matches(*ours_and_unfused(approximate), (x, bias), dy)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 26), (3, 1040)])
def test_without_bias(shape, dtype, approximate, device):
    x, _, dy = inputs(shape, dtype, device, has_bias=False)
    assert_op_matches(*ours_and_unfused(approximate), (x, None), dy)


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_of_another_dtype(dtype, bias_dtype, device):
    x, bias, dy = inputs((19, 48), dtype, device, bias_dtype=bias_dtype)
    assert_op_matches(bias_geglu, unfused, (x, bias), dy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_that_is_not_aligned(dtype, device):
    """A view that begins in the middle of 16 bytes, with a width that would suit them."""
    x, bias, dy = inputs((6, 64), dtype, device)
    buffer = torch.empty(x.numel() + 1, dtype=dtype, device=device)
    shifted = buffer[1:].copy_(x.flatten()).view(x.shape)
    results = [output_and_gradients(bias_geglu, (t, bias), dy) for t in (x, shifted)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("approximate", FORMS)
def test_all_of_the_curve(approximate, device):
    far = torch.tensor([1e4, -1e4, 1e20, -1e20, 0.0, -0.0, 1e-30])
    gate = torch.cat([torch.linspace(-12, 12, 2001), far]).to(device)
    x = torch.stack([gate, torch.full_like(gate, 0.5)], dim=-1)
    dy = torch.ones(len(gate), 1, device=device)
    ours, exact = ours_and_unfused(approximate)
    y, dx = output_and_gradients(ours, (x,), dy)
    exact_y, exact_dx = output_and_gradients(exact, (x.double(),), dy.double())
    # Here an error per value: the large ones must not hide the small ones.
    torch.testing.assert_close(y.double(), exact_y, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(dx.double(), exact_dx, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", FORMS)
def test_nan_and_inf_as_torch(dtype, approximate, device):
    nan, inf = float("nan"), float("inf")
    # Gates, then values: a NaN or inf in either half.
    x = torch.tensor([[1.0, nan, inf, -inf, -1.0, 2.0], [1.0, 1.0, 1.0, 1.0, nan, inf]], dtype=dtype, device=device)
    x = x.flatten()[None]
    bias, dy = torch.zeros(12, device=device), torch.ones(1, 6, dtype=dtype, device=device)
    ours, exact = ours_and_unfused(approximate)
    # What torch gives in float64 (its vectorised float32 differs at inf).
    expected = output_and_gradients(exact, (x.double(), bias.double()), dy.double())
    for a, e in zip(output_and_gradients(ours, (x, bias), dy), expected, strict=True):
        assert_close_to_reference(a, e)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_contiguous(dtype, device):
    x, bias, dy = inputs((12, 5, 104), dtype, device)
    x, dy, bias = x.transpose(0, 1)[..., ::2], dy.transpose(0, 1)[..., ::2], bias[::2]
    strided = output_and_gradients(bias_geglu, (x, bias), dy)
    packed = output_and_gradients(bias_geglu, (x.contiguous(), bias.contiguous()), dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))
    assert_op_matches(bias_geglu, unfused, (x, bias), dy)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_empty(shape, has_bias, device):
    x, bias, dy = inputs(shape, torch.bfloat16, device, has_bias)
    y, dx, *dbias = output_and_gradients(bias_geglu, (x, bias), dy)
    assert y.shape == dy.shape and dx.shape == shape
    assert not any(d.any() for d in dbias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_equal_again(dtype, device):
    x, bias, dy = inputs((200, 70), dtype, device)
    first, second = (output_and_gradients(bias_geglu, (x, bias), dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_equal_for_any_number_of_threads(dtype):
    x, bias, dy = inputs((300, 2400), dtype, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(output_and_gradients(bias_geglu, (x, bias), dy))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_enough_to_be_streamed(dtype):
    """Results of 4 MiB and more are written past the caches; in parts, they are not."""
    x, bias, dy = inputs((4200, 1024), dtype, "cpu")
    y, dx = bias_geglu(x, bias), torch.ops.fused_megatron.bias_geglu_backward(dy, x, bias, True, True, False)[0]
    for i in range(0, 4200, 1050):
        part = slice(i, i + 1050)
        assert torch.equal(y[part], bias_geglu(x[part], bias))
        backward = torch.ops.fused_megatron.bias_geglu_backward
        assert torch.equal(dx[part], backward(dy[part], x[part], bias, True, True, False)[0])


def test_only_needed_gradients_are_computed(device):
    x, bias, dy = inputs((10, 16), torch.float32, device)
    backward = torch.ops.fused_megatron.bias_geglu_backward
    dx, dbias = backward(dy, x, bias, True, True, True)
    only_dx, nothing = backward(dy, x, bias, True, True, False)
    assert torch.equal(only_dx, dx) and nothing.numel() == 0
    nothing, only_dbias = backward(dy, x, bias, True, False, True)
    torch.testing.assert_close(only_dbias, dbias)
    assert nothing.numel() == 0
    bias.requires_grad_()
    bias_geglu(x, bias).backward(dy)
    torch.testing.assert_close(bias.grad, dbias)
    assert x.grad is None


def test_no_grad_equals_grad(device):
    x, bias, _ = inputs((10, 16), torch.bfloat16, device)
    with torch.no_grad():
        y = bias_geglu(x, bias)
    assert torch.equal(y, bias_geglu(x.requires_grad_(), bias))


@pytest.mark.parametrize("approximate", FORMS)
def test_gradcheck_in_float64(approximate, device):
    x, bias, _ = (t.double().requires_grad_() for t in inputs((3, 6), torch.float32, device))
    torch.autograd.gradcheck(ours_and_unfused(approximate)[0], (x, bias))


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("has_bias", [True, False])
def test_opcheck(has_bias):
    x, bias, dy = inputs((6, 10), torch.float32, "cpu", has_bias)
    forward, backward = (getattr(torch.ops.fused_megatron, f"bias_geglu_{d}").default for d in ("forward", "backward"))
    torch.library.opcheck(forward, (x, bias, True))
    torch.library.opcheck(forward, (x.bfloat16().t(), None, False))
    torch.library.opcheck(backward, (dy, x, bias, True, True, has_bias))


@pytest.mark.cpu_kernel
def test_compile_fullgraph():
    x, bias, dy = inputs((6, 10), torch.float32, "cpu")

    def step(x, bias):
        return bias_geglu(x * 2, bias) * 3

    expected = output_and_gradients(step, (x, bias), dy)
    actual = output_and_gradients(torch.compile(step, fullgraph=True, backend="aot_eager"), (x, bias), dy)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.cpu_kernel
def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 6, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.empty(6, requires_grad=True)
        y = bias_geglu(x, bias)
        y.sum().backward()
        assert y.dtype == torch.bfloat16 and y.shape == (4, 3)
        assert x.grad.shape == (4, 6) and bias.grad.dtype == torch.float32


def test_bad_arguments(device):
    x = torch.zeros(3, 4, device=device)
    with pytest.raises(InputError, match=r"bias.shape=\(2,\) must be \(4,\)"):
        bias_geglu(x, torch.zeros(2, device=device))
    with pytest.raises(InputError, match=r"x.shape=\(3, 3\) must have an even last dim"):
        bias_geglu(x[:, :3])
    with pytest.raises(InputError, match=r"x.shape=\(\) must have"):
        bias_geglu(torch.zeros((), device=device))
    with pytest.raises(InputError, match="approximate='tahn' must be"):
        bias_geglu(x, None, "tahn")
    with pytest.raises(InputError, match="device"):
        bias_geglu(x, torch.zeros(4, device="meta"))
    with pytest.raises(TypeError, match=r"x.dtype=int64"):
        bias_geglu(x.long())
    with pytest.raises(TypeError, match=r"bias.dtype=int64"):
        bias_geglu(x, torch.zeros(4, dtype=torch.int64, device=device))
    with pytest.raises(RuntimeError, match="dy must have"):
        torch.ops.fused_megatron.bias_geglu_backward(x, x, None, True, True, False)

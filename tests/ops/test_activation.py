"""Start here when bias_gelu, bias_geglu or bias_swiglu gives a wrong value or gradient, or refuses an input."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.ops import bias_geglu, bias_gelu, bias_swiglu
from fused_megatron.testing.op_contract import CLAUSES, CPU_CLAUSES, Contract
from fused_megatron.testing.op_gradients import assert_op_matches, output_and_gradients
from fused_megatron.testing.tolerances import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")
OPS = {"gelu": bias_gelu, "geglu": bias_geglu, "swiglu": bias_swiglu}
FORMS = ["gelu tanh", "gelu none", "geglu tanh", "geglu none", "swiglu"]


def unfused(kind, x, bias=None, approximate="tanh"):
    u = x if bias is None else x + bias
    if kind == "gelu":
        return F.gelu(u, approximate=approximate)
    gate, value = u.chunk(2, -1)
    return (F.silu(gate) if kind == "swiglu" else F.gelu(gate, approximate=approximate)) * value


def ours_and_unfused(form):
    kind, *approximate = form.split()
    options = {"approximate": approximate[0]} if approximate else {}
    return functools.partial(OPS[kind], **options), functools.partial(unfused, kind, **options)


def draw(form, shape, dtype, *, bias_dtype=None, has_bias=True):
    """Return x [..., F] or [..., 2F], bias or None, and dy [..., F]; shape is the shape of dy."""
    generator = torch.Generator().manual_seed(0)
    width = shape[-1] * (1 if form.startswith("gelu") else 2) if shape else None

    def normal(*size):
        return 2 * torch.randn(size, generator=generator)

    bias = normal(width).to(bias_dtype or dtype) if has_bias else None
    x = normal(*shape[:-1], width) if shape else normal()
    return (x.to(dtype), bias), normal(*shape).to(dtype)


def contract(form, has_bias=True):
    drawn = functools.partial(draw, form, has_bias=has_bias)
    return Contract(*ours_and_unfused(form), drawn, empty=((0, 8), (3, 0, 8), (4, 0)), streamed=(4200, 512))


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("form", FORMS)
def test_contract(form, clause, device):
    contract(form).check(clause, device)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("clause", CPU_CLAUSES)
@pytest.mark.parametrize("form", FORMS[::2])
def test_contract_on_the_cpu(form, clause):
    contract(form).check(clause)


@pytest.mark.parametrize("clause", ["empty bfloat16", "gradients_of_gradients float32"])
@pytest.mark.parametrize("form", FORMS)
def test_contract_without_bias(form, clause, device):
    contract(form, has_bias=False).check(clause, device)


def check_against_float64(form, device, *args, **options):
    (x, bias), dy = draw(form, *args, **options)
    assert_op_matches(*ours_and_unfused(form), (x.to(device), None if bias is None else bias.to(device)), dy.to(device))


# Widths that are wide and aligned; too odd for wide accesses (where gated, of the second half only); one column; long
# enough for several blocks of columns and rows.
SHAPES = [(5, 8), (300, 264), (33, 257), (3, 1), (2, 3, 24), (90, 11), (4, 1036), (9,)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(form, shape, dtype, device):
    check_against_float64(form, device, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 27), (40, 13), (3, 1500), (3, 520), (), (1,)])
@pytest.mark.parametrize("form", FORMS)
def test_without_bias(form, shape, dtype, device):
    if shape or form.startswith("gelu"):
        check_against_float64(form, device, shape, dtype, has_bias=False)


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["gelu tanh", "geglu tanh", "swiglu"])
def test_bias_of_another_dtype(form, dtype, bias_dtype, device):
    check_against_float64(form, device, (19, 24), dtype, bias_dtype=bias_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_any_alignment_gives_the_same_output(form, dtype, device):
    """A view that does not begin at a multiple of 16 bytes, with a width that would allow wide accesses."""
    (x, bias), _ = draw(form, (6, 32), dtype)
    shifted = torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:].view(x.shape).copy_(x)
    ours, _ = ours_and_unfused(form)
    assert torch.equal(ours(shifted, bias.to(device)), ours(x.to(device), bias.to(device)))


FAR = torch.tensor([1e4, -1e4, 1e20, -1e20, 0.0, -0.0, 1e-30])


@pytest.mark.parametrize("form", FORMS[:2])
def test_all_of_the_curve(form, device):
    x = torch.cat([torch.linspace(-12, 12, 4001), FAR]).to(device)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)
    ours, exact = ours_and_unfused(form)
    y, dx = output_and_gradients(ours, (x,), dy)
    exact_y, exact_dx = output_and_gradients(exact, (x[:4001].double(),), dy[:4001].double())
    # Compared value by value: the errors of large values must not hide those of small values.
    assert (y[:4001] - exact_y).abs().max() < 2e-6
    assert ((dx[:4001] - exact_dx) / dy[:4001]).abs().max() < 2e-6
    assert torch.equal(y[4001:].cpu(), torch.tensor([1e4, 0.0, 1e20, 0.0, 0.0, 0.0, 5e-31]))
    slopes = (dx[4001:4005] / dy[4001:4005]).cpu()
    torch.testing.assert_close(slopes, torch.tensor([1.0, 0.0, 1.0, 0.0]), rtol=0, atol=1e-30)


@pytest.mark.parametrize("form", FORMS[2:])
def test_all_of_the_curve_of_a_gate(form, device):
    gate = torch.cat([torch.linspace(-12, 12, 2001), FAR]).to(device)
    x = torch.stack([gate, torch.full_like(gate, 0.5)], dim=-1)
    dy = torch.ones(len(gate), 1, device=device)
    ours, exact = ours_and_unfused(form)
    actual = output_and_gradients(ours, (x,), dy)
    for a, e in zip(actual, output_and_gradients(exact, (x.double(),), dy.double()), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_nan_and_inf_as_torch(form, dtype, device):
    # Gates, then values, with a NaN or inf in either half.
    halves = [[1.0, NAN, INF, -INF, -1.0, 2.0], [1.0, 1.0, 1.0, 1.0, NAN, INF]]
    x = torch.tensor([halves[0] + halves[1]], dtype=dtype, device=device)
    bias, dy = torch.zeros(12, device=device), torch.ones(1, 12, dtype=dtype, device=device)
    dy = dy if form.startswith("gelu") else dy[:, :6]
    ours, exact = ours_and_unfused(form)
    # Compared with torch in float64: its vectorised float32 differs at inf.
    expected = output_and_gradients(exact, (x.double(), bias.double()), dy.double())
    if form.startswith("gelu"):
        assert expected[0][0, :5].isnan().tolist() == [False, True, False, True, False]
    for a, e in zip(output_and_gradients(ours, (x, bias), dy), expected, strict=True):
        assert_close_to_reference(a, e)


@pytest.mark.parametrize("kind", OPS)
def test_the_raw_op_computes_what_is_needed(kind, device):
    backward = getattr(torch.ops.fused_megatron, f"bias_{kind}_backward")
    flags = () if kind == "swiglu" else (True,)
    (x, bias), dy = draw(kind, (10, 16), torch.float32)
    x, bias, dy = x.to(device), bias.to(device), dy.to(device)
    dx, dbias = backward(dy, x, bias, *flags, True, True)
    only_dx, nothing = backward(dy, x, bias, *flags, True, False)
    assert torch.equal(only_dx, dx) and nothing.numel() == 0
    nothing, only_dbias = backward(dy, x, bias, *flags, False, True)
    torch.testing.assert_close(only_dbias, dbias)
    assert nothing.numel() == 0


@pytest.mark.parametrize("kind", OPS)
def test_bad_arguments(kind, device):
    op, x = OPS[kind], torch.zeros(3, 4, device=device)
    with pytest.raises(InputError, match=r"bias.shape=\(2,\) must be \(4,\)"):
        op(x, torch.zeros(2, device=device))
    with pytest.raises(InputError, match="device"):
        op(x, torch.zeros(4, device="meta"))
    with pytest.raises(TypeError, match=r"x.dtype=int64"):
        op(x.long())
    with pytest.raises(TypeError, match=r"bias.dtype=int64"):
        op(x, torch.zeros(4, dtype=torch.int64, device=device))
    flags = () if kind == "swiglu" else (True,)
    with pytest.raises(RuntimeError, match="dy must have"):
        dy = x[:2] if kind == "gelu" else x
        getattr(torch.ops.fused_megatron, f"bias_{kind}_backward")(dy, x, None, *flags, True, False)
    if kind == "gelu":
        with pytest.raises(InputError, match=r"x.dim\(\)=0 must be at least 1"):
            op(torch.tensor(1.0, device=device), torch.zeros(1, device=device))
    else:
        with pytest.raises(InputError, match=r"x.shape=\(3, 3\) must have an even last dim"):
            op(x[:, :3])
        with pytest.raises(InputError, match=r"x.shape=\(\) must have"):
            op(torch.zeros((), device=device))
    if flags:
        with pytest.raises(InputError, match="approximate='tahn' must be"):
            op(x, None, "tahn")


def exact_gelu(u):
    """GELU and its derivative in float64, without cancellation below 0."""
    u = u.double()
    cdf = torch.special.erfc(-u * 0.5**0.5) / 2
    return u * cdf, cdf + u * torch.exp(-u * u / 2) * (2 * torch.pi) ** -0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exact_gelu_everywhere(dtype, device):
    """Every bfloat16 number, and float32 numbers a 4096th apart where the function is neither 0 nor u."""
    if dtype == torch.bfloat16:
        u = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        u = u[u.isfinite()]
    else:
        u = torch.arange(-13 * 4096, 13 * 4096, dtype=dtype) / 4096
    u = u.to(device).requires_grad_()
    y = bias_gelu(u[None], approximate="none")
    upstream = torch.where(torch.arange(u.numel(), device=device) % 3 == 0, -2.0, 1.0).to(dtype)
    (slope,) = torch.autograd.grad(y, u, upstream[None])
    value, right = exact_gelu(u.detach())
    # Half a unit in the last place; the arithmetic adds 4 units of float32, more where -u^2 / 2 is rounded.
    half_unit, float32 = torch.finfo(dtype).eps / 2, 2.0**-21 * (1 + u.detach().double().square().clamp(max=160) / 2)
    assert ((y.detach()[0].double() - value).abs() <= (half_unit + float32) * value.abs() + 2e-33).all()
    error = (slope.double() - right * upstream.double()).abs() / upstream.double().abs()
    assert (error <= half_unit * right.abs() + 3e-7).all()

"""Start here when bias_dropout_add gives a wrong value or gradient, or refuses an input."""

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.ops import bias_dropout_add
from fused_megatron.reference.philox import keep_mask, keep_scale
from fused_megatron.testing.op_contract import CLAUSES, CPU_CLAUSES, Contract
from fused_megatron.testing.tolerances import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (x, residual): the dtypes of residual may be wider.
DTYPE_PAIRS = [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
SEED = (0x1234_5678_9ABC, 77)


def rng(device, seed=SEED):
    return torch.tensor(seed, device=device)


def inputs(shape, dtype, device="cpu", has_bias=True, bias_dtype=None, residual_dtype=None, seed=0):
    """Return x, bias, residual and dy."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator) * 2.0

    bias = draw(shape[-1]).to(bias_dtype or dtype).to(device) if has_bias else None
    wide = residual_dtype or dtype
    return draw(*shape).to(dtype).to(device), bias, draw(*shape).to(wide).to(device), draw(*shape).to(wide).to(device)


def run(fn, x, bias, residual, dy):
    """Return y and the gradients of x, bias and residual, as far as they exist."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, bias, residual)]
    y = fn(*leaves)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def keep_of(shape, device, p, seed=SEED):
    if p in (0.0, 1.0):
        return torch.full(shape, p == 0.0, device=device)
    index = torch.arange(torch.Size(shape).numel(), device=device).reshape(shape)
    return keep_mask(rng(device, seed), index, p)


def torch_bias_dropout_add(keep, p):
    """Compute the same in torch, with a given mask."""
    scale = keep_scale(p)

    def call(x, bias, residual):
        return residual + (x if bias is None else x + bias) * keep * scale

    return call


def check_against_float64(x, bias, residual, dy, p=0.3):
    formula = torch_bias_dropout_add(keep_of(x.shape, x.device, p), p)
    exact = run(formula, *(None if t is None else t.double() for t in (x, bias, residual, dy)))
    wide = run(formula, *(None if t is None else t.float() for t in (x, bias, residual, dy)))
    actual = run(lambda *t: bias_dropout_add(*t, p, rng_state=rng(x.device)), x, bias, residual, dy)
    names = ("y", "dx", "dbias", "dresidual") if bias is not None else ("y", "dx", "dresidual")
    for name, a, e, z in zip(names, actual, exact, wide, strict=True):
        assert_close_to_reference(a, e, z.to(a.dtype), name=name)
    assert actual[0].dtype == residual.dtype
    assert torch.equal(actual[-1], dy)


# Wide and narrow accesses, rows that begin in the middle of a Philox block, rows longer than a block of columns.
SHAPES = [(5, 7), (24, 256), (3, 1), (3, 2051), (2, 3, 48), (70, 20), (9,), (6, 1032)]


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtypes, device):
    check_against_float64(*inputs(shape, dtypes[0], device, residual_dtype=dtypes[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 27), (3, 1500), (), (1,), (64, 160)], ids=str)
def test_without_bias(shape, dtype, device):
    check_against_float64(*inputs(shape, dtype, device, has_bias=False))


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-9, 0.999])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
def test_probabilities(p, dtypes, device):
    check_against_float64(*inputs((7, 40), dtypes[0], device, residual_dtype=dtypes[1]), p)


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_of_another_dtype(dtype, bias_dtype, device):
    for width in (33, 64):
        check_against_float64(*inputs((9, width), dtype, device, bias_dtype=bias_dtype))


def test_evaluation_is_a_plain_add(device):
    x, bias, residual, dy = inputs((5, 24), torch.bfloat16, device)
    evaluated = run(lambda *t: bias_dropout_add(*t, 0.5, False), x, bias, residual, dy)
    plain = run(lambda *t: bias_dropout_add(*t, 0.0), x, bias, residual, dy)
    assert all(torch.equal(a, b) for a, b in zip(evaluated, plain, strict=True))
    assert torch.equal(evaluated[0], (residual.float() + (x.float() + bias.float())).bfloat16())
    assert torch.equal(evaluated[1], dy)
    before = torch.get_rng_state()
    bias_dropout_add(x, bias, residual, 0.5, training=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_nan_and_inf_as_torch(dtype, p, device):
    """A dropped NaN or infinity is multiplied by 0, as torch does."""
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([1.0, nan, inf, -inf, 1e4, -1e4] * 8, dtype=dtype, device=device)
    keep = keep_of(x.shape, device, p)
    y = bias_dropout_add(x, None, torch.ones_like(x), p, rng_state=rng(device))
    expected = torch_bias_dropout_add(keep, p)(x.double(), None, torch.ones_like(x).double())
    assert_close_to_reference(y, expected)
    dropped = torch.nn.functional.dropout(torch.full((64,), inf), 0.5)
    assert dropped.isnan().any() and dropped.isinf().any()


def contract(wide=False):
    """Return the contract for a residual of the dtype of x, or of float32."""

    def ours(x, bias, residual):
        return bias_dropout_add(x, bias, residual, 0.3, rng_state=rng(x.device))

    def unfused(x, bias, residual):
        return torch_bias_dropout_add(keep_of(x.shape, x.device, 0.3), 0.3)(x, bias, residual)

    def draw(shape, dtype):
        *tensors, dy = inputs(shape, dtype, residual_dtype=torch.float32 if wide else None)
        return tensors, dy

    return Contract(ours, unfused, draw, empty=((0, 8), (3, 0, 8), (4, 0)))


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("wide", [False, True])
def test_contract(wide, clause, device):
    contract(wide).check(clause, device)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("clause", CPU_CLAUSES)
def test_contract_on_the_cpu(clause):
    contract(wide=clause == "fake_tensors bfloat16").check(clause)


def test_empty_without_bias_and_as_a_part(device):
    x, _, residual, dy = inputs((3, 0, 8), torch.bfloat16, device)
    y, dx, _ = run(lambda *t: bias_dropout_add(*t, 0.1), x, None, residual, dy)
    assert y.shape == dx.shape == (3, 0, 8)
    assert bias_dropout_add(x, None, residual, full_shape=(5, 2, 10)).shape == (3, 0, 8)


def test_only_needed_gradients_are_computed(device):
    _, bias, _, dy = inputs((10, 16), torch.float32, device)

    def backward(need_dx, need_dbias, bias=bias):
        op = torch.ops.fused_megatron.bias_dropout_add_backward
        return op(dy, bias, rng(device), torch.float32, 0.3, 0, 0, 0, 0, need_dx, need_dbias)

    dx, dbias = backward(True, True)
    only_dx, nothing = backward(True, False)
    assert torch.equal(only_dx, dx) and nothing.numel() == 0
    nothing, only_dbias = backward(False, True)
    torch.testing.assert_close(only_dbias, dbias)
    assert nothing.numel() == 0
    assert all(t.numel() == 0 for t in backward(False, False))
    x, bias, residual, dy = inputs((10, 16), torch.float32, device)
    bias.requires_grad_()
    bias_dropout_add(x, bias, residual, 0.0).backward(dy)
    torch.testing.assert_close(bias.grad, dy.sum(0))
    residual.requires_grad_()
    assert torch.autograd.grad(bias_dropout_add(x, None, residual), residual, dy)[0] is dy  # no copy


def test_gradcheck_in_float64(device):
    x, bias, residual, _ = (t.double().requires_grad_() for t in inputs((3, 5), torch.float32, device))
    state, place = rng(device), {"full_shape": (6, 9), "offset": (2, 3)}
    torch.autograd.gradcheck(lambda *t: bias_dropout_add(*t, 0.4, rng_state=state, **place), (x, bias, residual))
    mixed = bias_dropout_add(x.float(), bias.bfloat16(), residual, 0.4, rng_state=state)
    assert mixed.dtype == torch.float64


@pytest.mark.cpu_kernel
def test_opcheck_without_bias_and_state():
    x, _, residual, dy = inputs((6, 9), torch.bfloat16, residual_dtype=torch.float32)
    forward, backward = (
        getattr(torch.ops.fused_megatron, f"bias_dropout_add_{d}").default for d in ("forward", "backward")
    )
    torch.library.opcheck(forward, (x, None, residual, None, 1.0, 1, 3, 20, 0))
    torch.library.opcheck(backward, (dy, None, rng("cpu"), torch.bfloat16, 0.1, 0, 0, 0, 0, True, False))


@pytest.mark.cpu_kernel
def test_a_missing_state_is_drawn_in_the_graph():
    """Each call draws a new state, and the same seed draws the same states."""
    x = inputs((6, 9), torch.float32)[0]
    place = {"full_shape": (12, 9), "offset": (6, 0)}
    compiled = torch.compile(lambda x: bias_dropout_add(x, None, x, 0.5, **place), fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), first) and not torch.equal(first, second)


def test_bad_arguments(device):
    x = torch.zeros(3, 4, 5, device=device)
    for wanted, call in {
        r"p=1.5 must be in \[0, 1\]": lambda: bias_dropout_add(x, None, x, 1.5),
        "p=nan must be": lambda: bias_dropout_add(x, None, x, float("nan")),
        r"bias.shape=\(3,\) must be \(5,\)": lambda: bias_dropout_add(x, torch.zeros(3, device=device), x),
        r"residual.shape=\(4, 5\) must be": lambda: bias_dropout_add(x, None, x[0]),
        "residual.device=meta": lambda: bias_dropout_add(x, None, x.to("meta")),
        r"rng_state.shape=\(3,\)": lambda: bias_dropout_add(x, None, x, rng_state=torch.zeros(3).long().to(device)),
        "rng_state.device=meta": lambda: bias_dropout_add(x, None, x, rng_state=torch.zeros(2).long().to("meta")),
        "at least 1 when there is a bias": lambda: bias_dropout_add(x[0, 0, 0], x[0, 0, :1], x[0, 0, 0]),
        "offset must come with full_shape": lambda: bias_dropout_add(x, None, x, offset=(0, 0, 0)),
        r"full_shape=\(3, 4\) must have 3 dims": lambda: bias_dropout_add(x, None, x, full_shape=(3, 4)),
        r"offset\[2\]=2 must place x.shape\[2\]=5 inside full_shape\[2\]=6": lambda: bias_dropout_add(
            x, None, x, full_shape=(3, 4, 6), offset=(0, 0, 2)
        ),
        "cut along fewer dims": lambda: bias_dropout_add(
            x.expand(2, 3, 4, 5), None, x.expand(2, 3, 4, 5), full_shape=(2, 6, 8, 10)
        ),
    }.items():
        with pytest.raises(InputError, match=wanted):
            call()
    with pytest.raises(TypeError, match=r"x.dtype=int64"):
        bias_dropout_add(x.long(), None, x)
    with pytest.raises(TypeError, match=r"residual.dtype=bfloat16 must be one of: float32, float64"):
        bias_dropout_add(x, None, x.bfloat16())
    with pytest.raises(TypeError, match=r"residual.dtype=float16"):
        bias_dropout_add(x.bfloat16(), None, x.half())
    with pytest.raises(TypeError, match=r"rng_state.dtype=int32"):
        bias_dropout_add(x, None, x, rng_state=torch.zeros(2, dtype=torch.int32, device=device))

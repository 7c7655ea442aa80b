"""Start here when layer_norm or rms_norm gives a wrong value or gradient, with a residual or without."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.ops import layer_norm, rms_norm
from fused_megatron.testing.op_contract import CLAUSES, CPU_CLAUSES, Contract
from fused_megatron.testing.op_gradients import assert_op_matches, output_and_gradients
from fused_megatron.testing.tolerances import assert_close_to_reference

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FLOAT, BFLOAT, HALF]
STREAMS = [(FLOAT, FLOAT), (BFLOAT, BFLOAT), (HALF, HALF), (BFLOAT, FLOAT), (HALF, FLOAT)]
OPS = {"layer_norm": layer_norm, "rms_norm": rms_norm}
FORMS = ["weight+bias", "weight", "bias", "none"]
EPS = 1e-5


def draw(op, shape, dtype, *, stream=None, parameter=None, form="weight+bias", device="cpu"):
    """Return (x, weight, bias, residual), None where absent, and the upstream gradients of y and the total."""
    generator = torch.Generator().manual_seed(sum(shape))

    def random(size, dtype):
        return torch.randn(size, generator=generator).to(dtype).to(device)

    width = shape[-1:]
    x = random(shape, dtype) + 0.5
    weight = random(width, parameter or dtype) if "weight" in form else None
    bias = random(width, parameter or dtype) if "bias" in form and op == "layer_norm" else None
    dy = random(shape, dtype)
    if stream is None:
        return [x, weight, bias, None], [dy]
    return [x, weight, bias, random(shape, stream)], [dy, random(shape, stream)]


def ours(op, zero_centered_weight=False, eps=EPS):
    def run(x, weight, bias, residual):
        parameters = (weight, bias) if op == "layer_norm" else (weight,)
        return OPS[op](x, *parameters, eps, residual=residual, zero_centered_weight=zero_centered_weight)

    return run


def composite(op, zero_centered_weight=False, stream=None, eps=EPS):
    """The same in torch, in the dtype of the arguments; the total, but not its gradient, is rounded to `stream`."""

    def run(x, weight, bias, residual):
        total = x if residual is None else x + residual
        if residual is not None:
            total = total + (total.detach().to(stream).to(total.dtype) - total.detach())
        if weight is not None and zero_centered_weight:
            weight = 1 + weight
        if op == "rms_norm":
            y = F.rms_norm(total, x.shape[-1:], weight, eps)
        else:
            y = F.layer_norm(total, x.shape[-1:], weight, bias, eps)
        return y if residual is None else (y, total)

    return run


def check(op, sample, *, zero_centered_weight=False, eps=EPS):
    """Compare with float64; the yardstick is torch in float32 (its bfloat16 backward is wrong on the CPU)."""
    stream = None if sample[0][3] is None else sample[0][3].dtype
    theirs = composite(op, zero_centered_weight, stream, eps)
    return assert_op_matches(ours(op, zero_centered_weight, eps), theirs, *sample)


def contract(op, stream=None, form="weight+bias"):
    zero_centered_weight = stream is not None
    drawn = functools.partial(draw, op, stream=stream, form=form)
    theirs = composite(op, zero_centered_weight, stream)
    return Contract(ours(op, zero_centered_weight), theirs, drawn, odd=(3, 5), wide=(500, 200))


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("stream", [None, FLOAT], ids=["plain", "residual"])
@pytest.mark.parametrize("op", OPS)
def test_contract(op, stream, clause, device):
    contract(op, stream).check(clause, device)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("clause", CPU_CLAUSES)
@pytest.mark.parametrize("stream", [None, FLOAT], ids=["plain", "residual"])
@pytest.mark.parametrize("op", OPS)
def test_contract_on_the_cpu(op, stream, clause):
    contract(op, stream).check(clause)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("op", OPS)
def test_contract_of_a_wider_residual_and_of_no_parameters(op):
    """Here the gradient of the residual is a separate tensor, and absent gradients are empty tensors."""
    contract(op, FLOAT, form="none").check("opcheck bfloat16")
    contract(op, FLOAT).check("compile bfloat16")


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("op", OPS)
def test_threads_with_a_residual_of_16_bits(op, dtype):
    contract(op, getattr(torch, dtype)).check(f"threads {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (64, 256), (3, 2), (33, 1023), (2, 3, 48), (300, 17), (1, 5000), (9,)])
@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients(op, shape, dtype, device):
    check(op, draw(op, shape, dtype, device=device))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_optional_parameters(op, dtype, form, device):
    for width in (40, 41):
        check(op, draw(op, (17, width), dtype, form=form, device=device))


@pytest.mark.parametrize("zero_centered_weight", [False, True])
@pytest.mark.parametrize("use_total", [True, False])
@pytest.mark.parametrize("dtype,stream", STREAMS)
@pytest.mark.parametrize("op", OPS)
def test_residual(op, dtype, stream, use_total, zero_centered_weight, device):
    for width in (24, 33):
        inputs, dy = draw(op, (5, width), dtype, stream=stream, device=device)
        check(op, (inputs, dy if use_total else dy[:1]), zero_centered_weight=zero_centered_weight)


# For each dtype: 1, 4, 8 and 16 warps per row; then rows too long for a block's registers. Odd widths: narrow accesses.
@pytest.mark.parametrize("width", [8, 1000, 1032, 4104, 8200, 16392, 7, 1023, 1025, 16391])
@pytest.mark.parametrize("dtype,stream", [(FLOAT, None), (BFLOAT, None), (BFLOAT, FLOAT)])
@pytest.mark.parametrize("op", OPS)
def test_every_width(op, dtype, stream, width, device):
    rows = 21 if width <= 32 else 3 if width <= 4096 else 2
    check(op, draw(op, (rows, width), dtype, stream=stream, device=device))


# With the three multiprocessors of the emulation each block makes five rounds or more: a ring's slots are used again.
@pytest.mark.parametrize("width,rows", [(8, 241), (1032, 61), (4104, 31), (8200, 16)])
@pytest.mark.parametrize("stream", [None, FLOAT])
@pytest.mark.parametrize("op", OPS)
def test_many_rounds(op, stream, width, rows, device):
    check(op, draw(op, (rows, width), BFLOAT, stream=stream, device=device))


# float32 rows of this width with both gradients fill the shared memory of a block; 16-bit rows do not.
@pytest.mark.parametrize("op,dtype,stream", [("layer_norm", FLOAT, FLOAT), ("rms_norm", BFLOAT, FLOAT)])
def test_widest_in_registers(op, dtype, stream, device):
    check(op, draw(op, (2, 16384), dtype, stream=stream, device=device))


@pytest.mark.parametrize("parameter", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_parameters_of_another_dtype(op, dtype, parameter, device):
    for width in (40, 41):
        check(op, draw(op, (9, width), dtype, parameter=parameter, device=device), zero_centered_weight=True)


@pytest.mark.parametrize("rows", [1, 2, 17, 100])
@pytest.mark.parametrize("op", OPS)
def test_any_number_of_rows(op, rows, device):
    check(op, draw(op, (rows, 16), BFLOAT, stream=FLOAT, device=device))


@pytest.mark.parametrize("width", [16, 1032, 33])
@pytest.mark.parametrize("op", OPS)
def test_again_is_bitwise_equal(op, width, device):
    sample = draw(op, (19, width), BFLOAT, stream=FLOAT, device=device)
    first, again = (output_and_gradients(ours(op), *sample) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_the_rounded_total_is_normalised(op, device):
    (x, weight, bias, residual), _ = draw(op, (11, 72), BFLOAT, stream=BFLOAT, device=device)
    y, total = ours(op)(x, weight, bias, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, ours(op)(total, weight, bias, None))


@pytest.mark.parametrize("use_total", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("op", OPS)
def test_x_as_the_total(op, dtype, use_total, device):
    """The gradient of the norm and the gradient of what else reads x are one sum, rounded once."""
    (x, weight, bias, _), dy = draw(op, (5, 33), dtype, stream=dtype, device=device)

    def ours_with_x(x, weight, bias):
        parameters = (weight, bias) if op == "layer_norm" else (weight,)
        return OPS[op](x, *parameters, EPS, return_total=True)[: 1 + use_total]

    def theirs(x, weight, bias):
        return (composite(op)(x, weight, bias, None), x * 1)[: 1 + use_total]

    assert_op_matches(ours_with_x, theirs, [x, weight, bias], dy[: 1 + use_total])
    _, total = OPS[op](x.requires_grad_(), weight, return_total=True)
    assert torch.equal(total, x) and total.data_ptr() == x.data_ptr()
    assert torch.equal(torch.autograd.grad(total, x, dy[1])[0], dy[1])


@pytest.mark.parametrize("op", OPS)
def test_x_as_the_total_is_compiled(op):
    """A graph without breaks, and the same without gradients."""
    (x, weight, _, _), (dy, dtotal) = draw(op, (5, 33), FLOAT, stream=FLOAT)

    def run(x):
        return OPS[op](x * 2, weight, return_total=True)

    results = [
        output_and_gradients(function, [x], [dy, dtotal])
        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager"))
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(run(x), tuple(results[0][:2]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype,stream", [(FLOAT, FLOAT), (BFLOAT, FLOAT)])
@pytest.mark.parametrize("op", OPS)
def test_only_the_total_is_used_as_an_addition(op, dtype, stream, device):
    (x, weight, _, residual), (_, dtotal) = draw(op, (4, 8), dtype, stream=stream, device=device)
    _, total = OPS[op](x.requires_grad_(), weight, residual=residual.requires_grad_())
    dx, dresidual = torch.autograd.grad(total, (x, residual), dtotal)
    assert torch.equal(dx, dtotal.to(dtype)) and torch.equal(dresidual, dtotal)


@pytest.mark.parametrize("dtype,stream", [(FLOAT, FLOAT), (BFLOAT, FLOAT)])
@pytest.mark.parametrize("op", OPS)
def test_accumulated_gradients_are_not_one_tensor(op, dtype, stream, device):
    inputs, dy = draw(op, (4, 8), dtype, stream=stream, form="none", device=device)
    once = output_and_gradients(ours(op), inputs, dy)
    x, residual = (inputs[i].detach().requires_grad_() for i in (0, 3))
    for _ in range(2):
        torch.autograd.backward(OPS[op](x, eps=EPS, residual=residual), dy)
        assert x.grad.data_ptr() != residual.grad.data_ptr()
    torch.testing.assert_close([x.grad, residual.grad], [2 * gradient for gradient in once[2:]])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4])
@pytest.mark.parametrize("stream", [None, FLOAT], ids=["plain", "residual"])
@pytest.mark.parametrize("op", OPS)
def test_extreme_values_stay_in_their_row(op, stream, value, device):
    inputs, dy = draw(op, (4, 40), FLOAT, stream=stream, device=device)
    inputs[3 if stream else 0][1, 7] = value
    if value == 1e4:
        check(op, (inputs, dy))
        return
    actual, usual = (output_and_gradients(f, inputs, dy) for f in (ours(op), composite(op, stream=stream)))
    for index in range(len(actual)):
        if actual[index].dim() == 2 and not (stream and index == 1):  # the total is a sum, finite elsewhere
            bad = actual[index].isnan()
            assert torch.equal(bad.any(1).cpu(), torch.tensor([False, True, False, False]))
            assert op == "rms_norm" or bad[1].all()
            rest = [0, 2, 3]
            torch.testing.assert_close(actual[index][rest], usual[index][rest], rtol=1e-5, atol=1e-5)
    dweight, *dbias = (t for t in actual if t.dim() == 1)
    assert dweight.isnan().any() and not any(t.isnan().any() for t in dbias)


@pytest.mark.parametrize("offset,scale", [(1e4, 1.0), (0.0, 1e4), (-1e4, 100.0), (0.0, 1e-4), (0.0, 0.0)])
@pytest.mark.parametrize("op", OPS)
def test_large_mean_and_large_scale(op, offset, scale, device):
    (x, *others), dy = draw(op, (20, 513), FLOAT, device=device)
    check(op, ((x * scale + offset, *others), dy))


def test_constant_rows_give_the_bias(device):
    (x, weight, bias, _), dy = draw("layer_norm", (6, 64), FLOAT, device=device)
    x = torch.full_like(x, 3.0)
    assert torch.equal(layer_norm(x, weight, bias), bias.expand(6, 64))
    check("layer_norm", ((x, weight, bias, None), dy))


def test_rows_of_one_column(device):
    (x, weight, bias, _), (dy,) = draw("layer_norm", (5, 1), FLOAT, device=device)
    y, dx, dweight, dbias = output_and_gradients(ours("layer_norm"), (x, weight, bias, None), dy)
    assert torch.equal(y, bias.expand(5, 1)) and not dweight.any()
    torch.testing.assert_close(dbias, dy.sum(0))
    # A difference of equal numbers, times rstd = 1 / sqrt(eps) = 316.
    assert dx.abs().max() < 1e-6 * 316 * (dy * weight).abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_eps_none_is_the_default_of_torch(dtype, device):
    (x, weight, _, _), _ = draw("rms_norm", (6, 32), dtype, device=device)
    x = x * 1e-3  # mean squares near 1e-6: an eps of bfloat16 (8e-3) would show
    torch.testing.assert_close(rms_norm(x, weight), F.rms_norm(x, (32,), weight))


@pytest.mark.parametrize("op", OPS)
def test_eps_counts(op, device):
    check(op, draw(op, (6, 32), FLOAT, device=device), eps=0.5)


@pytest.mark.parametrize("op", OPS)
def test_expanded_upstream_gradient(op, device):
    inputs, (dy,) = draw(op, (8, 24), FLOAT, device=device)
    check(op, (inputs, [dy[:1].expand(8, 24)]))


def raw(op):
    """Return the raw ops: forward(x, *parameters, eps, ..), backward(dy, x, *parameters, *statistics, *needs, ..)."""
    return (getattr(torch.ops.fused_megatron, f"{op}_{d}").default for d in ("forward", "backward"))


@pytest.mark.parametrize("op", OPS)
def test_raw_ops_take_any_strides(op, device):
    (x, weight, _, _), (dy,) = draw(op, (16, 24), FLOAT, device=device)
    forward, backward = raw(op)
    parameters = (weight[:16],) if op == "rms_norm" else (weight[:16], None)
    y, *statistics, _ = forward(x.t(), *parameters, EPS)
    assert y.is_contiguous()
    needs = (True, True) if op == "rms_norm" else (True, True, False)
    gradients = backward(dy.t(), x.t(), *parameters, *statistics, *needs)
    wide = (x.t().double(), weight[:16].double(), None, None)
    exact = output_and_gradients(composite(op), wide, dy.t().double())
    for a, e in zip((y, *gradients[:2]), exact, strict=True):
        assert_close_to_reference(a, e, floor_ulps=8)
    assert all(gradient.numel() == 0 for gradient in gradients[2:])


@pytest.mark.parametrize("op", OPS)
def test_the_raw_op_computes_what_is_needed(op, device):
    (x, weight, bias, _), (dy,) = draw(op, (10, 16), FLOAT, device=device)
    forward, backward = raw(op)
    parameters = (weight,) if op == "rms_norm" else (weight, bias)
    _, *statistics, _ = forward(x, *parameters, EPS)
    every = [True] * (1 + len(parameters))
    full = backward(dy, x, *parameters, *statistics, *every)
    wanted = [[i == only for i in range(len(every))] for only in range(len(every))]
    for needs in [*wanted, [True, True, False][: len(every)], [False] * len(every)]:
        some = backward(dy, x, *parameters, *statistics, *needs)
        for needed, got, value in zip(needs, some, full, strict=False):
            assert torch.equal(got, value) if needed else got.numel() == 0


@pytest.mark.parametrize("op", OPS)
def test_raw_ops_refuse_what_they_cannot_read(op):
    forward, backward = raw(op)
    x, row = torch.zeros(3, 4), torch.zeros(3)
    parameters, statistics = ([None], [row]) if op == "rms_norm" else ([None, None], [row, row])
    with pytest.raises(RuntimeError, match="residual must have the shape"):
        forward(x, *parameters, EPS, x[:2])
    with pytest.raises(RuntimeError, match="residual must be float32 or of the dtype of x"):
        forward(x.half(), *parameters, EPS, x.bfloat16())
    with pytest.raises(RuntimeError, match="weight must have as many elements"):
        forward(x, torch.zeros(3), *parameters[1:], EPS)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        forward(x.int(), *parameters, EPS)
    needs = [True] * (1 + len(parameters))
    with pytest.raises(RuntimeError, match="dtotal must have the dtype of x"):
        backward(x, x, *parameters, *statistics, *needs, x.half())
    with pytest.raises(RuntimeError, match="dresidual is dx"):
        backward(x, x, *parameters, *statistics, *needs, None, True)
    with pytest.raises(RuntimeError, match="dy must have the shape"):
        backward(x[:2], x, *parameters, *statistics, *needs)
    with pytest.raises(RuntimeError, match="mean and rstd must be float32"):
        backward(x, x, *parameters, *[s[:2] for s in statistics], *needs)


@pytest.mark.parametrize("op", OPS)
def test_bad_arguments(op):
    function, x = OPS[op], torch.zeros(3, 4)
    with pytest.raises(InputError, match=r"weight.shape=\(3,\) must be \(4,\)"):
        function(x, torch.zeros(3))
    for without_a_column in (torch.zeros(3, 0), torch.tensor(1.0)):
        with pytest.raises(InputError, match="last dim of at least 1"):
            function(without_a_column)
    with pytest.raises(InputError, match="device"):
        function(x, torch.zeros(4, device="meta"))
    with pytest.raises(TypeError, match=r"x.dtype=int64"):
        function(x.long())
    with pytest.raises(TypeError, match=r"weight=\(4,\) must be a tensor or None: .* normalized_shape"):
        function(x, (4,))  # as F.layer_norm
    with pytest.raises(TypeError, match=r"weight.dtype=int64"):
        function(x, torch.zeros(4).long())
    with pytest.raises(InputError, match=r"residual.shape=\(4,\) must be \(3, 4\)"):
        function(x, residual=x[0])
    with pytest.raises(InputError, match="device"):
        function(x, residual=x.to("meta"))
    with pytest.raises(TypeError, match=r"residual.dtype=float16 must be one of: bfloat16, float32, float64"):
        function(x.bfloat16(), residual=x.half())


def test_bad_bias():
    with pytest.raises(TypeError, match=r"bias.dtype=int64"):
        layer_norm(torch.zeros(3, 4), None, torch.zeros(4).long())

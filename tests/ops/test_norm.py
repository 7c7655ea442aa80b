"""What layer_norm and rms_norm have in common: residual, zero-centred weight, and every path of the kernels."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.ops import layer_norm, rms_norm
from fused_megatron.testing.tolerances import assert_close_to_reference

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FLOAT, BFLOAT, HALF]
STREAMS = [(FLOAT, FLOAT), (BFLOAT, BFLOAT), (HALF, HALF), (BFLOAT, FLOAT), (HALF, FLOAT)]
OPS = {"layer_norm": layer_norm, "rms_norm": rms_norm}
EPS = 1e-5
NAMES = ("x", "weight", "bias", "residual")


def draw(op, shape, dtype, device, *, stream=None, parameter=None, bias=True):
    """Tensors by name: the arguments (those that are there), and the upstream gradients dy and dtotal."""
    generator = torch.Generator().manual_seed(sum(shape))

    def random(size, dtype):
        return torch.randn(size, generator=generator).to(dtype).to(device)

    width = shape[-1:]
    tensors = {"x": random(shape, dtype) + 0.5, "weight": random(width, parameter or dtype)}
    if op == "layer_norm" and bias:
        tensors["bias"] = random(width, parameter or dtype)
    tensors["dy"] = random(shape, dtype)
    if stream is not None:
        tensors["residual"], tensors["dtotal"] = random(shape, stream), random(shape, stream)
    return tensors


def ours(op, zero_centered_weight=False):
    def run(x, weight=None, bias=None, residual=None):
        if op == "rms_norm":
            return rms_norm(x, weight, EPS, residual=residual, zero_centered_weight=zero_centered_weight)
        return layer_norm(x, weight, bias, EPS, residual=residual, zero_centered_weight=zero_centered_weight)

    return run


def composite(op, zero_centered_weight=False, stream=None):
    """The same by torch, in the dtype of its arguments; the total rounded to the dtype `stream` (not its gradient)."""

    def run(x, weight=None, bias=None, residual=None):
        total = x if residual is None else x + residual
        if residual is not None:
            total = total + (total.detach().to(stream).to(total.dtype) - total.detach())
        if weight is not None and zero_centered_weight:
            weight = 1 + weight
        if op == "rms_norm":
            y = F.rms_norm(total, x.shape[-1:], weight, EPS)
        else:
            y = F.layer_norm(total, x.shape[-1:], weight, bias, EPS)
        return y if residual is None else (y, total)

    return run


def results(function, tensors, *, use_total=True, double=False):
    """Outputs and gradients by name."""
    tensors = {name: t.double() if double else t for name, t in tensors.items()}
    leaves = {name: tensors[name].detach().requires_grad_() for name in NAMES if name in tensors}
    outputs = function(**leaves)
    if "residual" not in leaves:
        outputs = (outputs,)
    names = ("y", "total")[: len(outputs)]
    upstream = [tensors["dy"], tensors.get("dtotal")][: len(outputs)]
    used = len(outputs) if use_total else 1
    gradients = torch.autograd.grad(outputs[:used], list(leaves.values()), upstream[:used])
    return dict(zip(names, outputs, strict=True)) | {
        f"d{name}": g for name, g in zip(leaves, gradients, strict=True)
    }  # fmt: skip


def check(op, tensors, *, zero_centered_weight=False, use_total=True):
    stream = tensors["residual"].dtype if "residual" in tensors else None
    actual = results(ours(op, zero_centered_weight), tensors, use_total=use_total)
    theirs = composite(op, zero_centered_weight, stream)
    exact = results(theirs, tensors, use_total=use_total, double=True)
    wide = results(theirs, {name: t.float() for name, t in tensors.items()}, use_total=use_total)
    for name, value in actual.items():
        wanted = {"y": tensors["x"].dtype, "total": stream}.get(name) or tensors[name.removeprefix("d")].dtype
        assert value.dtype == wanted, name
        assert_close_to_reference(value, exact[name], wide[name].to(value.dtype), name=name)
    return actual


@pytest.mark.parametrize("zero_centered_weight", [False, True])
@pytest.mark.parametrize("use_total", [True, False])
@pytest.mark.parametrize("dtype,stream", STREAMS)
@pytest.mark.parametrize("op", OPS)
def test_residual(op, dtype, stream, use_total, zero_centered_weight, device):
    for width in (24, 33):
        tensors = draw(op, (5, width), dtype, device, stream=stream)
        check(op, tensors, zero_centered_weight=zero_centered_weight, use_total=use_total)


# For each dtype: a warp a row, four, sixteen; then rows that fit in no block's registers. Odd widths: narrow accesses.
@pytest.mark.parametrize("width", [8, 1000, 1032, 4104, 16392, 7, 1023, 1025, 16391])
@pytest.mark.parametrize("dtype,stream", [(FLOAT, None), (BFLOAT, None), (BFLOAT, FLOAT)])
@pytest.mark.parametrize("op", OPS)
def test_every_width(op, dtype, stream, width, device):
    rows = 21 if width <= 32 else 3 if width <= 4096 else 2
    check(op, draw(op, (rows, width), dtype, device, stream=stream))


# float32 rows of this width with both gradients fill the shared memory of a block; those of 16 bits leave room.
@pytest.mark.parametrize("op,dtype,stream", [("layer_norm", FLOAT, FLOAT), ("rms_norm", BFLOAT, FLOAT)])
def test_widest_in_registers(op, dtype, stream, device):
    check(op, draw(op, (2, 16384), dtype, device, stream=stream))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_unaligned(op, dtype, device):
    tensors = draw(op, (7, 64), dtype, device, stream=dtype)
    shifted = {}
    for name, t in tensors.items():
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)
        shifted[name] = room[1:].view(t.shape).copy_(t)
    check(op, shifted)


@pytest.mark.parametrize("parameter", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_parameters_of_another_dtype(op, dtype, parameter, device):
    for width in (40, 41):
        tensors = draw(op, (9, width), dtype, device, parameter=parameter)
        check(op, tensors, zero_centered_weight=True)


@pytest.mark.parametrize("rows", [1, 2, 17, 100])
@pytest.mark.parametrize("op", OPS)
def test_any_number_of_rows(op, rows, device):
    check(op, draw(op, (rows, 16), BFLOAT, device, stream=FLOAT))


@pytest.mark.parametrize("dtype,stream", [(FLOAT, FLOAT), (BFLOAT, FLOAT)])
@pytest.mark.parametrize("op", OPS)
def test_not_contiguous(op, dtype, stream, device):
    tensors = draw(op, (6, 5, 26), dtype, device, stream=stream)
    strided = {
        name: t[::2] if t.dim() == 1 else t.transpose(0, 1)[..., ::2] for name, t in tensors.items()
    }  # fmt: skip
    packed = results(ours(op), {name: t.contiguous() for name, t in strided.items()})
    actual = check(op, strided)
    assert all(torch.equal(packed[name], value) for name, value in actual.items())


@pytest.mark.parametrize("op", OPS)
def test_empty_batch_with_residual(op, device):
    actual = results(ours(op), draw(op, (3, 0, 8), BFLOAT, device, stream=FLOAT))
    assert actual["y"].shape == actual["total"].shape == actual["dresidual"].shape == (3, 0, 8)
    assert not actual["dweight"].any()


@pytest.mark.parametrize("width", [16, 1032, 33])
@pytest.mark.parametrize("op", OPS)
def test_again_is_bitwise_equal(op, width, device):
    tensors = draw(op, (19, width), BFLOAT, device, stream=FLOAT)
    first, again = results(ours(op), tensors), results(ours(op), tensors)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("op", OPS)
def test_the_total_is_what_is_normalised(op, device):
    tensors = draw(op, (11, 72), BFLOAT, device, stream=BFLOAT)
    y, total = ours(op)(**{name: tensors[name] for name in NAMES if name in tensors})
    assert torch.equal(total, tensors["x"] + tensors["residual"])
    arguments = {"x": total} | {name: tensors[name] for name in ("weight", "bias") if name in tensors}
    assert torch.equal(y, ours(op)(**arguments))


@pytest.mark.parametrize("dtype,stream", [(FLOAT, FLOAT), (BFLOAT, FLOAT)])
@pytest.mark.parametrize("op", OPS)
def test_total_alone_is_an_addition(op, dtype, stream, device):
    tensors = draw(op, (4, 8), dtype, device, stream=stream)
    x, residual = (tensors[name].requires_grad_() for name in ("x", "residual"))
    _, total = OPS[op](x, tensors["weight"], residual=residual)
    dx, dresidual = torch.autograd.grad(total, (x, residual), tensors["dtotal"])
    assert torch.equal(dx, tensors["dtotal"].to(dtype)) and torch.equal(dresidual, tensors["dtotal"])


@pytest.mark.parametrize("dtype,stream", [(FLOAT, FLOAT), (BFLOAT, FLOAT)])
@pytest.mark.parametrize("op", OPS)
def test_accumulated_gradients_are_not_one_tensor(op, dtype, stream, device):
    tensors = draw(op, (4, 8), dtype, device, stream=stream)
    x, residual = (tensors[name].requires_grad_() for name in ("x", "residual"))
    for _ in range(2):
        y, total = OPS[op](x, eps=EPS, residual=residual)
        torch.autograd.backward((y, total), (tensors["dy"], tensors["dtotal"]))
        assert x.grad.data_ptr() != residual.grad.data_ptr()
    once = results(
        ours(op), tensors | {"x": x.detach(), "residual": residual.detach(), "weight": torch.ones_like(x[0])}
    )
    torch.testing.assert_close(residual.grad, 2 * once["dresidual"])
    torch.testing.assert_close(x.grad, 2 * once["dx"])


@pytest.mark.parametrize("need", ["x", "residual", "weight"])
@pytest.mark.parametrize("dtype,stream", [(FLOAT, FLOAT), (BFLOAT, FLOAT)])
@pytest.mark.parametrize("op", OPS)
def test_only_one_gradient_is_needed(op, dtype, stream, need, device):
    tensors = draw(op, (6, 16), dtype, device, stream=stream)
    full = results(ours(op), tensors)[f"d{need}"]
    arguments = {name: tensors[name] for name in NAMES if name in tensors}
    arguments[need] = arguments[need].detach().requires_grad_()
    outputs = ours(op)(**arguments)
    used = 1 if need == "weight" else 2
    (got,) = torch.autograd.grad(outputs[:used], arguments[need], (tensors["dy"], tensors["dtotal"])[:used])
    assert torch.equal(got, full)


@pytest.mark.parametrize("op", OPS)
def test_no_grad_equals_grad(op, device):
    tensors = draw(op, (10, 16), BFLOAT, device, stream=FLOAT)
    with torch.no_grad():
        outputs = ours(op)(**{name: tensors[name] for name in NAMES if name in tensors})
    actual = results(ours(op), tensors)
    assert torch.equal(outputs[0], actual["y"]) and torch.equal(outputs[1], actual["total"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4])
@pytest.mark.parametrize("op", OPS)
def test_extreme_values_stay_in_their_row(op, value, device):
    tensors = draw(op, (4, 40), FLOAT, device, stream=FLOAT)
    tensors["residual"][1, 7] = value
    if value == 1e4:
        check(op, tensors)
        return
    actual = results(ours(op), tensors)
    usual = results(composite(op, stream=FLOAT), tensors)
    for name in ("y", "dx", "dresidual"):
        assert actual[name][1].isnan().any()
        torch.testing.assert_close(actual[name][[0, 2, 3]], usual[name][[0, 2, 3]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero_centered_weight", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck_in_float64(op, zero_centered_weight, device):
    tensors = draw(op, (3, 5), torch.float64, device, stream=torch.float64)
    names = [name for name in NAMES if name in tensors]

    def function(*values):
        return ours(op, zero_centered_weight)(**dict(zip(names, values, strict=True)))

    arguments = [tensors[name].requires_grad_() for name in names]
    torch.autograd.gradcheck(function, arguments)
    torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("dtype,stream", [(FLOAT, FLOAT), (BFLOAT, FLOAT)])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, dtype, stream):
    t = draw(op, (6, 9), dtype, "cpu", stream=stream)
    forward, backward = (getattr(torch.ops.fused_megatron, f"{op}_{d}").default for d in ("forward", "backward"))
    parameters = (t["weight"],) if op == "rms_norm" else (t["weight"], t["bias"])
    torch.library.opcheck(forward, (t["x"], *parameters, EPS, t["residual"], True))
    _, *statistics, total = forward(t["x"], *parameters, EPS, t["residual"], True)
    separate = dtype != stream
    needs = [True] * (1 + len(parameters))
    arguments = (t["dy"], total, *parameters, *statistics, *needs, t["dtotal"], separate, True)
    torch.library.opcheck(backward, arguments)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("dtype,stream", [(FLOAT, FLOAT), (BFLOAT, FLOAT)])
@pytest.mark.parametrize("op", OPS)
def test_compile_fullgraph(op, dtype, stream):
    tensors = draw(op, (6, 9), dtype, "cpu", stream=stream)
    compiled = torch.compile(ours(op, True), fullgraph=True, backend="aot_eager")
    for use_total in (True, False):
        expected = results(ours(op, True), tensors, use_total=use_total)
        actual = results(compiled, tensors, use_total=use_total)
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name])


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("dtype,stream", STREAMS)
@pytest.mark.parametrize("op", OPS)
def test_bitwise_equal_for_any_number_of_threads(op, dtype, stream):
    tensors = draw(op, (500, 200), dtype, "cpu", stream=stream)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(results(ours(op), tensors))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], value) for name, value in other.items())


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("op", OPS)
def test_fake_tensors(op):
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 6, dtype=BFLOAT, requires_grad=True)
        residual = torch.empty(4, 6, requires_grad=True)
        y, total = OPS[op](x, eps=EPS, residual=residual)
        (y.float() + total).sum().backward()
        assert y.dtype == x.grad.dtype == BFLOAT and total.dtype == residual.grad.dtype == FLOAT


@pytest.mark.parametrize("op", OPS)
def test_bad_residual(op):
    x = torch.zeros(3, 4, dtype=BFLOAT)
    with pytest.raises(InputError, match=r"residual.shape=\(4,\) must be \(3, 4\)"):
        OPS[op](x, residual=x[0])
    with pytest.raises(InputError, match="device"):
        OPS[op](x, residual=x.to("meta"))
    with pytest.raises(TypeError, match=r"residual.dtype=float16 must be one of: bfloat16, float32, float64"):
        OPS[op](x, residual=x.half())


@pytest.mark.parametrize("op", OPS)
def test_raw_ops_refuse_what_they_cannot_read(op):
    forward, backward = (getattr(torch.ops.fused_megatron, f"{op}_{d}").default for d in ("forward", "backward"))
    x, row = torch.zeros(3, 4), torch.zeros(3)
    parameters, statistics = ([None], [row]) if op == "rms_norm" else ([None, None], [row, row])
    with pytest.raises(RuntimeError, match="residual must have the shape"):
        forward(x, *parameters, EPS, x[:2])
    with pytest.raises(RuntimeError, match="residual must be float32 or of the dtype of x"):
        forward(x.half(), *parameters, EPS, x.bfloat16())
    needs = [True] * (1 + len(parameters))
    with pytest.raises(RuntimeError, match="dtotal must have the dtype of x"):
        backward(x, x, *parameters, *statistics, *needs, x.half())
    with pytest.raises(RuntimeError, match="dresidual is dx"):
        backward(x, x, *parameters, *statistics, *needs, None, True)
    with pytest.raises(RuntimeError, match="dy must have the shape"):
        backward(x[:2], x, *parameters, *statistics, *needs)
    with pytest.raises(RuntimeError, match="mean and rstd must be float32"):
        backward(x, x, *parameters, *[s[:2] for s in statistics], *needs)

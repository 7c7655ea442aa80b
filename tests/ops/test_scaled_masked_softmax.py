"""Start here when scaled_masked_softmax gives a wrong value or gradient, or refuses an input."""

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.ops import scaled_masked_softmax
from fused_megatron.testing.op_contract import CLAUSES, CPU_CLAUSES, Contract
from fused_megatron.testing.tolerances import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [{}, {"causal": True}, {"causal": True, "window": 5}]
NAN, INF = float("nan"), float("inf")


def inputs(shape, dtype, device="cpu", mask_shape=None, seed=0):
    """Return x, dy and a mask that hides 3 of 10 keys."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = ((torch.randn(shape, generator=generator) * 3).to(dtype).to(device) for _ in range(2))
    mask = None if mask_shape is None else (torch.rand(mask_shape, generator=generator) < 0.3).to(device)
    return x, dy, mask


def torch_softmax(x, mask=None, scale=1.0, causal=False, window=None):
    """The same in plain torch; rows without a key are set to 0 afterwards."""
    num_queries, num_keys = (1, *x.shape)[-2:]
    hidden = torch.zeros(num_queries, num_keys, dtype=torch.bool, device=x.device)
    if causal:
        ones = torch.ones_like(hidden)
        hidden |= ones.triu(num_keys - num_queries + 1)
        if window is not None:
            hidden |= ones.tril(num_keys - num_queries - window)
    hidden = hidden[0] if x.dim() == 1 else hidden
    hidden = (hidden if mask is None else hidden | mask).expand(x.shape)
    none = hidden.all(-1, keepdim=True)
    y = torch.softmax((x * scale).masked_fill(hidden & ~none, -INF), dim=-1)
    return y.masked_fill(none, 0.0)


def run(fn, x, dy, mask=None, scale=1.0, **form):
    x = x.detach().requires_grad_()
    y = fn(x, mask, scale, **form)
    return y, torch.autograd.grad(y, x, dy)[0]


def check_against_float64(x, dy, mask=None, scale=0.7, **form):
    exact = run(torch_softmax, x.double(), dy.double(), mask, scale, **form)
    yardstick = run(torch_softmax, x, dy, mask, scale, **form)
    actual = run(scaled_masked_softmax, x, dy, mask, scale, **form)
    for name, a, e, z in zip(("y", "dx"), actual, exact, yardstick, strict=True):
        assert a.dtype == x.dtype and a.is_contiguous()
        assert_close_to_reference(a, e, z, name=name)
    hidden = exact[0] == 0.0
    assert not actual[0][hidden].any() and not actual[1][hidden].any()
    return actual


def contract(form, has_mask):
    def draw(shape, dtype):
        x, dy, mask = inputs(shape, dtype, mask_shape=shape[-2:] if has_mask else None)
        return (x, mask), dy

    return Contract(
        lambda x, mask: scaled_masked_softmax(x, mask, 0.7, **form),
        lambda x, mask: torch_softmax(x, mask, 0.7, **form),
        draw,
        shape=(4, 6, 48),
        odd=(2, 3, 5),
        empty=((0, 8), (3, 0, 8), (4, 0), (0,), (2, 0, 4, 0)),
        wide=(3, 100, 700),
        yardstick=None,
    )


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("form,has_mask", [({}, False), (FORMS[2], True)], ids=["plain", "masked"])
def test_contract(form, has_mask, clause, device):
    contract(form, has_mask).check(clause, device)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("clause", CPU_CLAUSES)
@pytest.mark.parametrize("form,has_mask", [(FORMS[1], False), (FORMS[2], True)], ids=["causal", "masked"])
def test_contract_on_the_cpu(form, has_mask, clause):
    contract(form, has_mask).check(clause)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 5, 7), (2, 2, 17, 64), (9, 1), (1, 9), (7,), (2, 40, 33), (2, 24, 200), (130, 130)], ids=str
)
def test_values_and_gradient(shape, dtype, form, device):
    check_against_float64(*inputs(shape, dtype, device)[:2], **form)


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
@pytest.mark.parametrize("num_keys", [513, 1000, 1024, 2056, 4096, 9001])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_widths(dtype, num_keys, form, device):
    check_against_float64(*inputs((3, num_keys), dtype, device)[:2], **form)


@pytest.mark.parametrize("form", [{}, {"causal": True, "window": 20000}], ids=str)
@pytest.mark.parametrize("num_keys", [16385, 40000])
def test_rows_too_long_for_registers(num_keys, form, device):
    x, dy, mask = inputs((2, num_keys), torch.bfloat16, device, (2, num_keys))
    check_against_float64(x, dy, mask, **form)


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "mask_shape",
    [(2, 4, 5, 48), (2, 1, 5, 48), (1, 1, 5, 48), (5, 48), (48,), (2, 1, 1, 48), (4, 5, 1), (1,), (1, 4, 1, 48)],
    ids=str,
)
def test_masks_that_broadcast(mask_shape, dtype, form, device):
    check_against_float64(*inputs((2, 4, 5, 48), dtype, device, mask_shape), **form)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_masks_with_strides(dtype, device):
    x, dy, mask = inputs((2, 2, 5, 40), dtype, device, (2, 2, 40, 10))
    check_against_float64(x, dy, mask.transpose(2, 3)[:, :, ::2])
    check_against_float64(x, dy, mask.transpose(2, 3)[:, :1, ::2], causal=True)
    wide = inputs((1,), dtype, device, (2, 1, 5, 83))[2]
    check_against_float64(x, dy, wide[..., 3:43])
    check_against_float64(x, dy, wide[..., 1:81:2])


def test_masks_that_need_many_strides(device):
    x, dy, _ = inputs((2, 2, 2, 2, 3, 24), torch.bfloat16, device)
    for shape in [(2, 1, 2, 1, 3, 24), (2, 2, 1, 2, 1, 24), (1, 2, 1, 2, 3, 1)]:
        check_against_float64(x, dy, inputs((1,), torch.bfloat16, device, shape)[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -1.3, 1 / 3, 50.0])
def test_scales(scale, dtype, device):
    x, dy, mask = inputs((6, 5, 90), dtype, device, (5, 90))
    y, _ = check_against_float64(x, dy, mask, scale, causal=True)
    if scale == 0.0:
        assert_close_to_reference(y, torch_softmax(torch.zeros_like(x).double(), mask, causal=True))


def test_scale_is_not_rounded_to_the_dtype(device):
    # 0.3 rounded to bfloat16 has an error of 1e-3, which becomes 10% at scores of a hundred.
    x = torch.tensor([[300.0, 310.0, 320.0]], dtype=torch.bfloat16, device=device)
    y = scaled_masked_softmax(x, scale=0.3)
    torch.testing.assert_close(y.double(), torch.softmax(x.double() * 0.3, -1), rtol=4e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_without_a_key(form, dtype, device):
    x, dy, mask = inputs((2, 12, 70), dtype, device, (2, 12, 70))
    mask[0, 3], mask[1, 11], mask[1, 2, 1:] = True, True, True
    y, dx = check_against_float64(x, dy, mask, **form)
    for t in (y, dx):
        assert not t[0, 3].any() and not t[1, 11].any()
    # More queries than keys: the first queries come before every key.
    x, dy, _ = inputs((2, 20, 9), dtype, device)
    y, dx = check_against_float64(x, dy, causal=True)
    assert not y[:, :11].any() and not dx[:, :11].any() and y[:, 11:].any(-1).all()


def test_unseen_rows_of_minus_infinity_are_rows_without_a_key(device):
    x, dy, _ = inputs((4, 50), torch.float32, device)
    x[1] = -INF
    y, dx = run(scaled_masked_softmax, x, dy)
    assert not y[1].any() and not dx[1].any()
    rest = torch.tensor([0, 2, 3], device=device)
    expected = run(torch_softmax, x[rest], dy[rest])
    torch.testing.assert_close((y[rest], dx[rest]), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e4, -1e4, 6e4])
def test_extreme_scores_as_torch(value, dtype, device):
    x, dy, _ = inputs((5, 90), dtype, device)
    x[1, 0] = x[2, 37] = x[3, 89] = value
    expected = torch.softmax(x.double(), -1)
    y, dx = run(scaled_masked_softmax, x, dy)
    assert_close_to_reference(y, expected, torch.softmax(x, -1), name="y")
    assert torch.equal(dx.isnan().any(-1), expected.isnan().any(-1))


@pytest.mark.parametrize("value", [NAN, INF])
def test_hidden_keys_have_no_effect(value, device):
    x, dy, mask = inputs((6, 6, 90), torch.float32, device, (6, 1, 90))
    expected = run(scaled_masked_softmax, x, dy, mask)
    y, dx = run(scaled_masked_softmax, x.masked_fill(mask, value), dy, mask)
    assert torch.equal(y, expected[0]) and torch.equal(dx, expected[1])
    above = torch.ones(6, 90, dtype=torch.bool, device=device).triu(85)
    form = {"causal": True, "window": 60}
    hidden = above | torch.ones_like(above).tril(84 - 60)
    expected = run(scaled_masked_softmax, x, dy, mask, **form)
    y, dx = run(scaled_masked_softmax, x.masked_fill(hidden, value), dy.masked_fill(hidden, value), mask, **form)
    assert torch.equal(y, expected[0]) and torch.equal(dx, expected[1])


def test_hidden_keys_are_zero_beside_a_nan(device):
    x, dy, mask = inputs((4, 100), torch.bfloat16, device, (4, 100))
    mask[2, 7], mask[2, 8] = False, True
    x[2, 7] = NAN
    y, _ = run(scaled_masked_softmax, x, dy, mask, causal=True)
    seen = ~mask[2] & (torch.arange(100, device=device) < 99)
    assert torch.equal(y[2].isnan(), seen) and not y[2][~seen].any()
    assert not y[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_not_contiguous(dtype, form, device):
    x, dy, mask = inputs((4, 2, 3, 96), dtype, device, (2, 1, 48))
    x, dy = (t.transpose(0, 1)[..., ::2] for t in (x, dy))
    mask = mask.expand(2, 4, 48)[:, :, None]
    strided = run(scaled_masked_softmax, x, dy, mask, **form)
    packed = run(scaled_masked_softmax, x.contiguous(), dy.contiguous(), mask.contiguous(), **form)
    assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))
    check_against_float64(x, dy, mask, **form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skip", [1, 3, 8])
def test_unaligned_memory(skip, dtype, device):
    x, dy, _ = inputs((3, 4, 64), dtype, device)
    placed = [torch.empty(skip + x.numel(), dtype=dtype, device=device)[skip:].view(x.shape).copy_(t) for t in (x, dy)]
    actual = run(scaled_masked_softmax, *placed, causal=True)
    expected = run(scaled_masked_softmax, x, dy, causal=True)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_keys", [2048, 2047])
def test_large_results_that_go_past_the_caches(num_keys, dtype):
    # All matrices have the same rows: one that is small enough for the caches gives the expected result.
    queries = 8500 if dtype != torch.float32 else 4300
    x, dy, _ = inputs((1, num_keys), dtype)
    large = run(scaled_masked_softmax, x.expand(queries, -1), dy.expand(queries, -1), causal=True, window=1500)
    first = queries - 60
    small = run(scaled_masked_softmax, x.expand(60, -1), dy.expand(60, -1), causal=True, window=1500)
    for a, e in zip(large, small, strict=True):
        assert torch.equal(a[first:], e)
        assert not a[: queries - num_keys].any()


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4,)])
def test_gradcheck_in_float64(shape, form):
    x, _, mask = inputs(shape, torch.float64, mask_shape=shape)
    if len(shape) > 1:
        mask[1] = True
    torch.autograd.gradcheck(lambda x: scaled_masked_softmax(x, mask, 0.8, **form), x.requires_grad_())


def test_bad_arguments(device):
    x = torch.zeros(2, 3, 4, device=device)
    with pytest.raises(InputError, match=r"mask.shape=\(2, 4\) must broadcast to x.shape=\(2, 3, 4\)"):
        scaled_masked_softmax(x, torch.zeros(2, 4, dtype=torch.bool, device=device))
    with pytest.raises(InputError, match="must broadcast"):
        scaled_masked_softmax(x, torch.zeros(1, 2, 3, 4, dtype=torch.bool, device=device))
    with pytest.raises(TypeError, match=r"mask.dtype=float32 must be one of: bool"):
        scaled_masked_softmax(x, torch.zeros(3, 4, device=device))
    with pytest.raises(InputError, match=r"mask.device=meta"):
        scaled_masked_softmax(x, torch.zeros(3, 4, dtype=torch.bool, device="meta"))
    with pytest.raises(InputError, match=r"window=3 .* needs causal=True"):
        scaled_masked_softmax(x, window=3)
    with pytest.raises(InputError, match="window=0 must be at least 1"):
        scaled_masked_softmax(x, causal=True, window=0)
    for scale in (NAN, INF, 1e39):
        with pytest.raises(InputError, match=r"scale=.* must be a finite"):
            scaled_masked_softmax(x, scale=scale)
    with pytest.raises(InputError, match=r"x.shape=\(\) must have a dimension of keys"):
        scaled_masked_softmax(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"x.dtype=int64"):
        scaled_masked_softmax(x.long())


@pytest.mark.cpu_kernel
def test_bad_arguments_of_the_raw_op():
    forward = torch.ops.fused_megatron.scaled_masked_softmax_forward
    backward = torch.ops.fused_megatron.scaled_masked_softmax_backward
    x = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="must broadcast"):
        forward(x, torch.zeros(2, 4, dtype=torch.bool), 1.0, False, 0)
    with pytest.raises(RuntimeError, match="must be bool"):
        forward(x, torch.zeros(3, 4), 1.0, False, 0)
    with pytest.raises(RuntimeError, match="window"):
        forward(x, None, 1.0, False, 3)
    with pytest.raises(RuntimeError, match="dtype, shape and device"):
        backward(torch.zeros(2, 4), x, 1.0, False, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("num_keys", [16384, 32768, 131072, 300000])
def test_long_rows_on_a_gpu(num_keys):
    x, dy, mask = inputs((40, num_keys), torch.bfloat16, "cuda", (num_keys,))
    check_against_float64(x, dy, mask)
    check_against_float64(x, dy, causal=True)

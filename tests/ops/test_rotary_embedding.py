"""Start here when rotary_embedding gives a wrong value or gradient."""

import pytest
import torch

from fused_megatron.ops import rotary_embedding
from fused_megatron.testing.tolerances import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 40  # of the tables


def tables(half, device="cpu", dtype=torch.float32, rows=ROWS):
    angle = torch.arange(rows).double()[:, None] * 100.0 ** -(torch.arange(half).double() / max(half, 1))
    return angle.cos().to(dtype).to(device), angle.sin().to(dtype).to(device)


def draw(shape, dtype, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def rotate_half(x, interleaved):
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def torch_rotary(x, cos, sin, position, interleaved):
    """The usual implementation; position has the dims of x without the last two."""
    twice = (lambda t: t.repeat_interleave(2, -1)) if interleaved else (lambda t: torch.cat((t, t), -1))
    c, s = (twice(t[position]).unsqueeze(-2) for t in (cos, sin))
    turned, rest = x[..., : c.shape[-1]], x[..., c.shape[-1] :]
    return torch.cat((turned * c + rotate_half(turned, interleaved) * s, rest), -1)


def run(fn, inputs, upstream):
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = [y for y in fn(*leaves) if y is not None]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def check_against_float64(inputs, cos, sin, position, *, interleaved=False, dy=None, **arguments):
    """Compare with float64; inputs is [q] or [q, k]."""
    dy = [draw(t.shape, t.dtype, t.device, 5 + i) for i, t in enumerate(inputs)] if dy is None else dy

    def usual(dtype):
        def fn(*leaves):
            return [torch_rotary(x, cos.to(dtype), sin.to(dtype), position, interleaved) for x in leaves]

        return run(fn, [t.to(dtype) for t in inputs], [t.to(dtype) for t in dy])

    def fn(q, k=None):
        return rotary_embedding(q, k, cos, sin, interleaved=interleaved, **arguments)

    actual = run(fn, inputs, dy)
    for i, (a, e, z) in enumerate(zip(actual, usual(torch.float64), usual(torch.float32), strict=True)):
        assert_close_to_reference(a, e, z.to(a.dtype), name=f"result {i}")
        assert a.dtype == inputs[0].dtype and a.is_contiguous()


def heads(shape, k_heads, dtype, device):
    return [draw(shape, dtype, device), draw((*shape[:-2], k_heads, shape[-1]), dtype, device, 1)]


# Wide accesses with one, several and more than 32 chunks per head, more heads than lanes; and narrow accesses.
HEAD_SHAPES = [(4, 4, 16), (8, 2, 64), (3, 1, 48), (1, 1, 544), (2, 1, 6), (5, 3, 34), (40, 3, 32)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", HEAD_SHAPES, ids=str)
def test_values_and_gradients(sizes, dtype, interleaved, device):
    q_heads, k_heads, head_dim = sizes
    position = torch.arange(5, device=device)[:, None].expand(5, 2)
    inputs = heads((5, 2, q_heads, head_dim), k_heads, dtype, device)
    check_against_float64(inputs, *tables(head_dim // 2, device), position, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_of_another_dtype(dtype, table_dtype, interleaved, device):
    position = torch.arange(3, device=device)[:, None]
    for head_dim in (32, 10):
        inputs = heads((3, 1, 2, head_dim), 1, dtype, device)
        check_against_float64(inputs, *tables(head_dim // 2, device, table_dtype), position, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "half"), [(64, 16), (48, 8), (17, 4), (32, 0), (64, 6), (1, 0)])
def test_partial_rotary_dim(head_dim, half, dtype, interleaved, device):
    position = torch.arange(3, device=device)[:, None].expand(3, 2)
    inputs = heads((3, 2, 5, head_dim), 2, dtype, device)
    check_against_float64(inputs, *tables(half, device), position, interleaved=interleaved)
    q_out, _ = rotary_embedding(*inputs, *tables(half, device))
    assert torch.equal(q_out[..., 2 * half :], inputs[0][..., 2 * half :])


@pytest.mark.parametrize("sequence_dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_and_positions(dtype, sequence_dim, device):
    shape = (6, 3) if sequence_dim == 0 else (3, 6)
    inputs = heads((*shape, 2, 16), 1, dtype, device)
    cos_sin = tables(8, device)
    sequence = torch.arange(6, device=device)
    along = (lambda t: t[:, None].expand(shape)) if sequence_dim == 0 else (lambda t: t[None].expand(shape))
    across = (lambda t: t[None]) if sequence_dim == 0 else (lambda t: t[:, None])
    each = torch.tensor([0, 9, 4], device=device)
    drawn = torch.randint(ROWS, shape, generator=torch.Generator().manual_seed(0)).to(device)
    one = torch.tensor(11, device=device)
    strided = torch.stack((drawn, -drawn), -1)[..., 0]
    for position, arguments in [
        (along(sequence), {}),
        (along(sequence + ROWS - 6), {"offset": ROWS - 6}),
        (along(sequence + 11), {"offset": one}),
        (along(sequence + 11), {"offset": one.reshape(1)}),
        (along(sequence) + across(each), {"offset": each}),
        (drawn, {"positions": drawn}),
        (drawn, {"positions": strided}),
        (along(drawn.flatten()[:6]), {"positions": drawn.flatten()[:6]}),
    ]:
        check_against_float64(inputs, *cos_sin, position, sequence_dim=sequence_dim, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_sequences(index_dtype, dtype, device):
    lengths = [3, 0, 0, 7, 1, 5, 0]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(index_dtype)
    position = torch.cat([torch.arange(n) for n in lengths]).to(device)
    inputs = heads((16, 3, 32), 2, dtype, device)
    check_against_float64(inputs, *tables(16, device), position, cu_seqlens=cu_seqlens)
    check_against_float64(inputs, *tables(16, device), position + 5, cu_seqlens=cu_seqlens, offset=5)
    each = torch.arange(7, device=device)
    shifted = position + torch.repeat_interleave(each, torch.tensor(lengths, device=device))
    check_against_float64(inputs, *tables(16, device), shifted, cu_seqlens=cu_seqlens, offset=each)
    # Packed sequences give the same as each sequence by itself.
    whole, _ = rotary_embedding(*inputs, *tables(16, device), cu_seqlens=cu_seqlens)
    parts = [rotary_embedding(part, None, *tables(16, device))[0] for part in inputs[0].split(lengths)]
    assert torch.equal(whole, torch.cat(parts))


def test_one_sequence_without_a_batch(device):
    inputs = heads((7, 3, 32), 2, torch.float32, device)
    check_against_float64(inputs, *tables(16, device), torch.arange(7, device=device) + 2, offset=2)
    position = torch.tensor([3, 1, 4, 1, 5, 9, 2], device=device)
    check_against_float64(inputs, *tables(16, device), position, positions=position)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views(dtype, interleaved, device):
    """Views of a fused qkv tensor, transposed views, and views whose last dim is not dense."""
    position = torch.arange(5, device=device)[:, None].expand(5, 2)
    fused = draw((5, 2, 3, 4 + 2, 32), dtype, device)  # [S, B, groups, q heads + k + v, D]
    views = [
        [fused[..., 0, :4, :], fused[..., 1, 4:5, :]],
        [fused[..., 0, :4, :].transpose(0, 1).contiguous().transpose(0, 1), fused[..., 2, 5:, :]],
        [fused[..., 0, :, 1:17], fused[..., 1, :2, 1:17]],  # no address is a multiple of 16 bytes
        [fused[..., 0, :, ::2], fused[..., 1, :2, ::2]],
        [fused[..., 0, :1, :].expand(5, 2, 4, 32), fused[..., 1, :2, :]],
    ]
    for inputs in views:
        dy = [draw((*t.shape[:2], t.shape[3], t.shape[2]), dtype, device).transpose(-1, -2) for t in inputs]
        half = inputs[0].shape[-1] // 2
        check_against_float64(inputs, *tables(half, device), position, interleaved=interleaved, dy=dy)


def test_strided_tables(device):
    cos, sin = (t.repeat(1, 2)[:, ::2] for t in tables(16, device))
    position = torch.arange(4, device=device)[:, None]
    check_against_float64(heads((4, 1, 2, 32), 1, torch.float32, device), cos, sin, position)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_nan_inf_and_large_values(dtype, interleaved, device):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([1.0, nan, inf, -inf, 1e4, -1e4, 0.0, 1e-6] * 4, dtype=dtype, device=device)
    x = torch.stack([x, x.flip(0), x.roll(3)]).reshape(3, 1, 1, 32)
    position = torch.arange(3, device=device)[:, None]
    check_against_float64([x], *tables(16, device), position, interleaved=interleaved)


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (4, 0, 3, 8), (4, 2, 0, 8), (4, 2, 3, 0), (0, 3, 8)], ids=str)
def test_empty(shape, device):
    inputs = heads(shape, 1, torch.bfloat16, device)
    results = run(lambda q, k: rotary_embedding(q, k, *tables(shape[-1] // 2, device)), inputs, inputs)
    assert [r.shape for r in results] == [t.shape for t in (*inputs, *inputs)]
    if len(shape) == 3:
        cu_seqlens = torch.zeros(3, dtype=torch.int32, device=device)
        assert rotary_embedding(*inputs, *tables(4, device), cu_seqlens=cu_seqlens)[0].shape == shape


def test_only_needed_gradients_are_computed(device):
    cos_sin, (q, k) = tables(8, device), heads((4, 2, 3, 16), 1, torch.float32, device)
    dq, dk = draw(q.shape, q.dtype, device, 3), draw(k.shape, k.dtype, device, 4)
    expected = run(lambda q, k: rotary_embedding(q, k, *cos_sin), [q, k], [dq, dk])[2:]
    q.requires_grad_()
    q_out, k_out = rotary_embedding(q, k, *cos_sin)
    assert torch.equal(torch.autograd.grad(q_out, q, dq)[0], expected[0])
    k.requires_grad_()
    q_out, k_out = rotary_embedding(q.detach(), k, *cos_sin)
    assert torch.equal(torch.autograd.grad(k_out, k, dk)[0], expected[1])
    q_out, nothing = rotary_embedding(q, None, *cos_sin)
    assert nothing is None
    assert torch.equal(torch.autograd.grad(q_out, q, dq)[0], expected[0])


def test_twice_is_bitwise_equal_no_grad_equals_grad_and_inputs_stay(device):
    for dtype in DTYPES:
        inputs, cos_sin = heads((9, 2, 5, 64), 2, dtype, device), tables(32, device)
        before = [t.clone() for t in inputs]
        first, again = (run(lambda q, k, t=cos_sin: rotary_embedding(q, k, *t), inputs, inputs) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        with torch.no_grad():
            assert torch.equal(rotary_embedding(*inputs, *cos_sin)[1], first[1])
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 6])
def test_a_position_without_a_row_is_nan(head_dim, dtype, device):
    """Kernels do this where positions are not checked; they never read outside the tables."""
    op = torch.ops.fused_megatron.rotary_embedding
    cos, sin = tables(head_dim // 2 - 1, device, rows=3)
    q = draw((5, 1, 3, head_dim), dtype, device)

    def bad(*tensors, start=0):
        y, _ = op(q if tensors[2] is None else q[:, 0], None, cos, sin, *tensors, start, 0, False, False)
        assert torch.equal(y[..., -2:], (q if tensors[2] is None else q[:, 0])[..., -2:])
        nan = y[..., :-2].isnan()
        assert torch.equal(nan.all(-1), nan.any(-1))
        return nan.all(-1).all(-1).flatten().nonzero().flatten().tolist()

    assert bad(None, None, None) == [3, 4]
    assert bad(None, None, None, start=-1) == [0, 4]
    assert bad(torch.tensor([0, 2**62, -1, -(2**62), 2], device=device), None, None) == [1, 2, 3]
    assert bad(None, torch.tensor([2**40], device=device), None) == [0, 1, 2, 3, 4]
    assert bad(None, None, torch.tensor([1, 2, 4], device=device)) == [0, 4]
    assert bad(None, None, torch.tensor([0, 5], device=device, dtype=torch.int32)) == [3, 4]
    assert bad(None, None, torch.tensor([7, 9], device=device)) == [0, 1, 2, 3, 4]


@pytest.mark.cpu_kernel
def test_equal_for_any_number_of_threads():
    inputs, threads = heads((64, 3, 8, 64), 2, torch.float32, "cpu"), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(lambda q, k: rotary_embedding(q, k, *tables(32, rows=64)), inputs, inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck_in_float64(interleaved, device):
    q, k = (t.requires_grad_() for t in heads((3, 2, 2, 6), 1, torch.float64, device))
    cos, sin = tables(2, device, torch.float64)
    torch.autograd.gradcheck(lambda q, k: rotary_embedding(q, k, cos, sin, interleaved=interleaved, offset=3), (q, k))

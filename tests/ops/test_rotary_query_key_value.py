"""Start here when query and key are rotated wrongly in the buffer of the fused product, or get a wrong gradient."""

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.ops import rotary_embedding
from fused_megatron.ops.rotary_query_key_value import rotary_query_key_value, split_query_key_value
from fused_megatron.testing.op_gradients import output_and_gradients

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


def draw(shape, dtype, device="cpu", rotated=None):
    """Return x [S, B, heads D], the tables, and an upstream gradient."""
    generator = torch.Generator().manual_seed(sum(shape))
    seq_len, batch, heads, head_dim = shape
    angles = torch.rand(seq_len + 3, (rotated or head_dim) // 2, generator=generator) * 6
    x, dy = (torch.randn(seq_len, batch, heads * head_dim, generator=generator) for _ in range(2))
    return x.to(device, dtype), angles.cos().to(device), angles.sin().to(device), dy.to(device, dtype)


def out_of_place(x, cos, sin, heads, head_by_head):
    query, key, value = split_query_key_value(x, *heads, head_by_head=head_by_head)
    return *rotary_embedding(query, key, cos, sin), value


def in_place(x, cos, sin, heads, head_by_head):
    # The sum is not a leaf, and its maker does not keep it.
    return rotary_query_key_value(x + 0, cos, sin, num_heads=heads[0], num_kv_heads=heads[1], head_by_head=head_by_head)


# Wide and narrow accesses; some columns that do not rotate; large enough for several threads.
@pytest.mark.parametrize(
    ("heads", "head_by_head", "sizes"),
    [
        ((4, 4), True, (5, 2, 16, 16)),
        ((4, 2), False, (7, 3, 16, 16)),
        ((3, 1), False, (5, 1, 6, 6)),
        ((2, 2), False, (6, 2, 10, 6)),
        ((8, 4), False, (130, 2, 64, 64)),
    ],
)
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF, torch.float64])
def test_the_same_bits_as_out_of_place(heads, head_by_head, sizes, dtype, device):
    seq_len, batch, head_dim, rotated = sizes
    x, cos, sin, _ = draw((seq_len, batch, heads[0] + 2 * heads[1], head_dim), dtype, device, rotated)
    wanted = out_of_place(x, cos, sin, heads, head_by_head)
    upstream = [
        torch.randn(each.shape, generator=torch.Generator().manual_seed(i)).to(each) for i, each in enumerate(wanted)
    ]
    # Attention returns gradients of other strides than the buffer.
    upstream[1] = upstream[1].transpose(0, 1).contiguous().transpose(0, 1)
    results = [
        output_and_gradients(lambda x, f=f: f(x, cos, sin, heads, head_by_head), [x], upstream)
        for f in (in_place, out_of_place)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("head_by_head", [True, False])
def test_nothing_but_the_buffer_is_held(head_by_head, device):
    x, cos, sin, dy = draw((6, 2, 12, 8), BFLOAT, device)
    with torch.no_grad():
        parts = rotary_query_key_value(x, cos, sin, num_heads=4, num_kv_heads=4, head_by_head=head_by_head)
    assert {each.untyped_storage().data_ptr() for each in parts} == {x.untyped_storage().data_ptr()}
    leaf = dy.clone().requires_grad_()
    query, key, value = in_place(leaf, cos, sin, (4, 4), head_by_head)
    assert query.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    assert not query.is_leaf and query.requires_grad and value.requires_grad
    (gradient,) = torch.autograd.grad(key.float().sum(), leaf)  # the other two have none: zeros
    expected = torch.autograd.grad(out_of_place(leaf, cos, sin, (4, 4), head_by_head)[1].float().sum(), leaf)[0]
    assert torch.equal(gradient, expected)


def test_a_saved_buffer_is_an_error_and_not_a_wrong_gradient(device):
    x, cos, sin, _ = draw((6, 2, 6, 8), FLOAT, device)
    saved = x.requires_grad_().exp()
    query, _, _ = rotary_query_key_value(saved, cos, sin, num_heads=2, num_kv_heads=2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        query.sum().backward()


@pytest.mark.cpu_kernel
def test_opcheck():
    x, cos, sin, _ = draw((4, 2, 6, 8), FLOAT)
    query, key, _ = split_query_key_value(x, 2, 2, head_by_head=True)
    outs = split_query_key_value(torch.empty_like(x), 2, 2, head_by_head=False)[:2]
    torch.library.opcheck(torch.ops.fused_megatron.rotary_embedding_out.default, (query, key, *outs, cos, sin, 0, True))


def test_compiled_without_a_break():
    x, cos, sin, _ = draw((4, 2, 6, 8), FLOAT)

    def run(x):
        query, key, value = in_place(x * 2, cos, sin, (2, 2), True)
        return query * 3, key.cos(), value

    dy = [torch.randn(4, 2, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [output_and_gradients(f, [x], dy) for f in (run, compiled)]
    torch.testing.assert_close(*results)


X, COS, SIN, _ = draw((4, 2, 6, 8), FLOAT)


@pytest.mark.parametrize(
    ("x", "tables", "heads", "message"),
    [
        (X, (COS[:3], SIN[:3]), (2, 2), r"cos.shape=\(3, 4\) and sin.shape=\(3, 4\) must be \[at least 4, Drot / 2\]"),
        (X, (COS, SIN[:, :2]), (2, 2), "must be"),
        (X.transpose(0, 1), (COS, SIN), (2, 2), "must be contiguous"),
        (X.clone().requires_grad_(), (COS, SIN), (2, 2), "a leaf that requires a gradient"),
        (X, (COS, SIN), (3, 4), r"qkv.shape=\(4, 2, 48\) must end in a multiple of num_heads \+ 2 num_kv_heads = 11"),
        (X, (COS, SIN), (4, 1), "num_kv_heads=1 must equal num_heads=4, head by head"),
    ],
)
def test_bad_arguments(x, tables, heads, message):
    with pytest.raises(InputError, match=message):
        rotary_query_key_value(x, *tables, num_heads=heads[0], num_kv_heads=heads[1], head_by_head=True)


def test_the_raw_op_refuses_other_memory():
    query, key, _ = split_query_key_value(X, 2, 2, head_by_head=True)
    rotate = torch.ops.fused_megatron.rotary_embedding_out
    with pytest.raises(RuntimeError, match="q_out and k_out must"):
        rotate(query, key, torch.empty(4, 2, 3, 8), torch.empty_like(key), COS, SIN, 0, False)
    with pytest.raises(RuntimeError, match="side by side"):
        rotate(query, key, torch.empty(4, 2, 8, 2).transpose(2, 3), torch.empty_like(key), COS, SIN, 0, False)

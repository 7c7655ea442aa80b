"""Start here when normalised and rotated heads of query and key, or their gradients, are wrong."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.ops import query_key_norm, rms_norm
from fused_megatron.ops.rotary_query_key_value import split_query_key_value
from fused_megatron.testing.op_contract import CLAUSES, CPU_CLAUSES, Contract
from fused_megatron.testing.op_gradients import assert_op_matches

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FLOAT, BFLOAT, HALF]
EPS = 1e-5


def tables(rows, half, device="cpu", dtype=FLOAT):
    angles = torch.arange(rows).double()[:, None] * 100.0 ** -(torch.arange(half).double() / max(half, 1))
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def draw(shape, dtype, heads=(2, 1), device="cpu"):
    """Return [qkv, q_weight, k_weight] and the upstream gradients of query, key and value."""
    generator = torch.Generator().manual_seed(sum(shape))
    head_dim = shape[-1] // (heads[0] + 2 * heads[1])

    def random(*sizes):
        return torch.randn(sizes, generator=generator).to(device, dtype)

    upstream = [random(*shape[:2], n, head_dim) for n in (heads[0], heads[1], heads[1])]
    return [random(*shape) + 0.5, random(head_dim), random(head_dim) + 1], upstream


def ours(half, heads=(2, 1), head_by_head=False, **options):
    """The op; it may overwrite its input only where nothing is differentiated."""

    def run(qkv, q_weight, k_weight):
        qkv = qkv.contiguous() if torch.is_grad_enabled() else qkv.clone(memory_format=torch.contiguous_format)
        rotary = () if half is None else tables(qkv.shape[0] + 2, half, qkv.device)
        numbers = {"num_heads": heads[0], "num_kv_heads": heads[1], "head_by_head": head_by_head, "eps": EPS}
        return query_key_norm(qkv, q_weight, k_weight, *rotary, **numbers, **options)

    return run


def usual(half, heads=(2, 1), head_by_head=False):
    """The same in plain torch, in the dtype of the arguments."""

    def turned(x, cos, sin):
        first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)

    def run(qkv, q_weight, k_weight):
        query, key, value = split_query_key_value(qkv, *heads, head_by_head=head_by_head)
        query = F.rms_norm(query, q_weight.shape, q_weight, EPS)
        key = F.rms_norm(key, k_weight.shape, k_weight, EPS)
        if half is None:
            return query, key, value
        rows = [t[: qkv.shape[0], None, None].to(qkv.dtype) for t in tables(qkv.shape[0] + 2, half, qkv.device)]
        return turned(query, *rows), turned(key, *rows), value

    return run


# 4 heads in all. A quarter of a head rotates with wide accesses, and the rest does not.
SHAPES = {"shape": (5, 2, 128), "odd": (3, 1, 20), "empty": ((0, 2, 32), (3, 0, 32)), "wide": (300, 2, 512)}


def contract(form):
    def half_of(x):
        return None if form == "norm" else x.shape[-1] // 16

    return Contract(
        lambda x, *others: ours(half_of(x))(x, *others),
        lambda x, *others: usual(half_of(x))(x, *others),
        draw,
        **SHAPES,
    )


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("form", ["norm", "norm and rotary"])
def test_contract(form, clause, device):
    contract(form).check(clause, device)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("clause", [each for each in CPU_CLAUSES if each.split()[0] not in ("opcheck", "streaming")])
@pytest.mark.parametrize("form", ["norm", "norm and rotary"])
def test_contract_on_the_cpu(form, clause):
    contract(form).check(clause)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("half", [None, 3])
def test_opcheck(half):
    (x, *weights), dy = draw((3, 2, 32), FLOAT)
    heads = split_query_key_value(x, 2, 1, head_by_head=False)
    results = split_query_key_value(torch.empty_like(x), 2, 1, head_by_head=False)
    others = (*weights, *((None, None) if half is None else tables(4, half)), EPS)
    torch.library.opcheck(torch.ops.fused_megatron.query_key_norm_out.default, (*heads[:2], *results[:2], *others))
    backward = torch.ops.fused_megatron.query_key_norm_backward_out.default
    torch.library.opcheck(backward, (*dy, *heads[:2], *results, *others))


# (query heads, key heads), head dim, pairs that rotate. Wide accesses with one, several and 32 shares of a head, runs
# without a partner, more heads than a warp takes at a time; then narrow accesses, and heads of more than 32 shares.
SIZES = [
    ((4, 4), 16, 8),
    ((8, 2), 128, 64),
    ((8, 2), 128, None),
    ((40, 3), 32, 8),
    ((1, 1), 512, 256),
    ((3, 1), 24, None),
    ((2, 1), 72, 16),
    ((3, 1), 6, 3),
    ((5, 2), 34, 4),
    ((2, 2), 7, None),
    ((2, 1), 200, 100),
    ((1, 1), 1000, 3),
    ((1, 1), 1, None),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients(sizes, dtype, device):
    heads, head_dim, half = sizes
    sample = draw((5, 2, (heads[0] + 2 * heads[1]) * head_dim), dtype, heads, device)
    assert_op_matches(ours(half, heads), usual(half, heads), *sample)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_head_by_head(dtype, device):
    """The heads of query, key and value alternate, as in the product of models without shared heads."""
    heads = (4, 4)
    sample = draw((6, 2, 12 * 32), dtype, heads, device)
    assert_op_matches(ours(16, heads, True), usual(16, heads, True), *sample)


@pytest.mark.parametrize("parameters", [FLOAT, BFLOAT])
def test_other_dtypes_of_weights_and_tables(parameters, device):
    (x, q_weight, k_weight), dy = draw((4, 2, 128), BFLOAT, device=device)
    weights = q_weight.to(parameters), k_weight.to(parameters)
    numbers = {"num_heads": 2, "num_kv_heads": 1, "eps": EPS}
    cos, sin = tables(4, 8, device, BFLOAT)

    def run(x, *weights):
        return query_key_norm(x.contiguous(), *weights, cos.to(x.dtype), sin.to(x.dtype), **numbers)

    def wide(x, q_weight, k_weight):
        return query_key_norm(x.double(), q_weight.double(), k_weight.double(), cos.double(), sin.double(), **numbers)

    assert_op_matches(run, wide, [x, *weights], dy)


def test_many_tokens(device):
    """Several rounds of each block, and several parts of the sums of the weights' gradients."""
    heads = (2, 1)
    sample = draw((1500, 3, 4 * 16), BFLOAT, heads, device)
    assert_op_matches(ours(4, heads), usual(4, heads), *sample)


@pytest.mark.parametrize("half", [None, 8])
def test_weights_of_zero_have_a_gradient(half, device):
    """Backward must not compute the heads from the normalised heads."""
    (x, q_weight, k_weight), dy = draw((3, 1, 64), FLOAT, device=device)
    q_weight[::2] = 0
    assert_op_matches(ours(half), usual(half), [x, q_weight, k_weight], dy)


@pytest.mark.parametrize("head_by_head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_without_gradients(dtype, head_by_head, device):
    heads = (2, 2)
    (x, *weights), _ = draw((5, 2, 6 * 48), dtype, heads, device)
    rotary, numbers = tables(5, 16, device), {"num_heads": 2, "num_kv_heads": 2, "head_by_head": head_by_head}
    before = x.clone()
    wanted = query_key_norm(x, *weights, *rotary, eps=EPS, **numbers)
    assert torch.equal(x, before)
    with torch.no_grad():
        found = query_key_norm(x, *weights, *rotary, eps=EPS, **numbers)
    assert {each.untyped_storage().data_ptr() for each in found} == {x.untyped_storage().data_ptr()}
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_one_buffer_of_gradients_for_any_of_the_outputs(device):
    (x, *weights), _ = draw((3, 2, 128), BFLOAT, device=device)
    leaf, *weights = (each.requires_grad_() for each in (x, *weights))
    for which in range(3):
        results = [
            torch.autograd.grad(f(leaf, *weights)[which].float().sum(), [leaf, *weights], materialize_grads=True)
            for f in (ours(8), lambda *args: ours(8)(*(each.double() for each in args)))
        ]
        for found, right in zip(*results, strict=True):
            torch.testing.assert_close(found.double(), right.double(), rtol=0.02, atol=0.05)
    assert results[0][0].is_contiguous()


@pytest.mark.cpu_kernel
def test_large_heads_run_on_the_two_ops():
    sample = draw((2, 1, 3 * 2048), FLOAT, (1, 1))
    assert_op_matches(ours(64, (1, 1)), usual(64, (1, 1)), *sample)


X, Q_WEIGHT, K_WEIGHT = draw((4, 2, 32), FLOAT)[0]
COS, SIN = tables(4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], Q_WEIGHT, K_WEIGHT), r"qkv.shape=\(2, 32\) must be \[S, B, a multiple of 4 heads\]"),
        ((X[..., :30], Q_WEIGHT, K_WEIGHT), "must be .S, B, a multiple of 4 heads"),
        ((X.transpose(0, 1), Q_WEIGHT, K_WEIGHT), "must be contiguous"),
        ((X, Q_WEIGHT[:3], K_WEIGHT), r"q_weight.shape=\(3,\) must be \(8,\)"),
        ((X, Q_WEIGHT, K_WEIGHT.to("meta")), "k_weight.device=meta"),
        ((X, Q_WEIGHT, K_WEIGHT, COS), "cos and sin must be given together"),
        ((X, Q_WEIGHT, K_WEIGHT, COS[:3], SIN[:3]), r"cos.shape=\(3, 4\) must be \[at least 4, at most 4\]"),
        ((X, Q_WEIGHT, K_WEIGHT, COS, SIN[:, :2]), r"sin.shape=\(4, 2\) must be \(4, 4\)"),
        ((X, Q_WEIGHT, K_WEIGHT, COS.clone().requires_grad_(), SIN), "cos.requires_grad=True must be False"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        query_key_norm(*arguments, num_heads=2, num_kv_heads=1, eps=EPS)


def test_bad_dtypes():
    for arguments in ((X.long(), Q_WEIGHT, K_WEIGHT), (X, Q_WEIGHT.int(), K_WEIGHT)):
        with pytest.raises(TypeError, match="must be one of"):
            query_key_norm(*arguments, num_heads=2, num_kv_heads=1, eps=EPS)


def test_the_raw_op_refuses_other_memory():
    query, key, value = split_query_key_value(X, 2, 1, head_by_head=False)
    forward = torch.ops.fused_megatron.query_key_norm_out
    backward = torch.ops.fused_megatron.query_key_norm_backward_out
    others = (Q_WEIGHT, K_WEIGHT, COS, SIN, EPS)
    with pytest.raises(RuntimeError, match="q_out and k_out must"):
        forward(query, key, torch.empty(4, 2, 3, 8), torch.empty_like(key), *others)
    with pytest.raises(RuntimeError, match="side by side"):
        forward(query, key, torch.empty(4, 2, 8, 2).transpose(2, 3), torch.empty_like(key), *others)
    with pytest.raises(RuntimeError, match="dv must be like k"):
        outs = [torch.empty_like(each) for each in (query, key, value)]
        backward(query, key, value[:3], query, key, *outs, *others)


def test_without_eps_it_adds_what_rms_norm_adds():
    generator = torch.Generator().manual_seed(3)
    x = 1e-4 * torch.randn(3, 2, 32, generator=generator, requires_grad=True)
    weights = [torch.randn(8, generator=generator) for _ in range(2)]
    query, key, _ = split_query_key_value(x, 2, 1, head_by_head=False)
    found = query_key_norm(x, *weights, num_heads=2, num_kv_heads=1)
    for normalised, head, weight in zip(found[:2], (query, key), weights, strict=True):
        torch.testing.assert_close(normalised, rms_norm(head, weight))

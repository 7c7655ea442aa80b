"""Start here when rotary_embedding fails under torch.compile, or refuses an input."""

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.ops import rotary_embedding


def tables(half, rows=40, **kwargs):
    angle = torch.arange(rows)[:, None] * 0.5 ** torch.arange(half)
    return angle.cos().to(**kwargs), angle.sin().to(**kwargs)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("has_k", [True, False])
def test_opcheck(has_k):
    op = torch.ops.fused_megatron.rotary_embedding.default
    q, k = torch.randn(4, 2, 3, 8), torch.randn(4, 2, 1, 8) if has_k else None
    torch.library.opcheck(op, (q, k, *tables(4), None, torch.tensor([2]), None, 0, 0, False, False))
    packed = (q[:, 0].bfloat16(), None, *tables(3), None, None, torch.tensor([0, 1, 4]), 1, 0, True, True)
    torch.library.opcheck(op, packed)


@pytest.mark.cpu_kernel
def test_compile_fullgraph():
    q, k = torch.randn(4, 2, 3, 8), torch.randn(4, 2, 1, 8)

    def step(q, k, offset, positions):
        first = rotary_embedding(q * 2, k, *tables(4), offset=offset)
        packed, _ = rotary_embedding(q[:, 0], None, *tables(4), cu_seqlens=torch.tensor([0, 3, 4]))
        again = rotary_embedding(first[0], first[1], *tables(4), positions=positions, interleaved=True)
        return [packed * 3, *(t.cos() for t in again)]

    def run(step):
        leaves = [t.clone().requires_grad_() for t in (q, k)]
        outputs = step(*leaves, torch.tensor(3), torch.tensor([3, 1, 4, 1]))
        return [*outputs, *torch.autograd.grad(outputs, leaves, [t.detach() for t in outputs])]

    for a, e in zip(run(torch.compile(step, fullgraph=True, backend="aot_eager")), run(step), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.cpu_kernel
def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(4, 2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
        q_out, k_out = rotary_embedding(q, q[:, :, :1], *tables(4), positions=torch.zeros(4, dtype=torch.int64))
        (q_out.sum() + k_out.sum()).backward()
        assert k_out.shape == (4, 2, 1, 8) and q.grad.shape == q.shape and q.grad.dtype == torch.bfloat16


Q, K = torch.zeros(4, 2, 3, 8), torch.zeros(4, 2, 1, 8)
COS, SIN = tables(4, rows=6)
INT = torch.int64


@pytest.mark.parametrize(
    ("wanted", "arguments", "keywords"),
    [
        (r"q.shape=\(4, 2\) must be", (Q[..., 0, 0], None, COS, SIN), {}),
        ("sequence_dim=2 must be 0 or 1", (Q, K, COS, SIN), {"sequence_dim": 2}),
        ("sequence_dim=1 must be 0 for 3", (Q[0], None, COS, SIN), {"sequence_dim": 1}),
        (r"k.shape=\(4, 1, 1, 8\) must be \(4, 2, 1, 8\)", (Q, K[:, :1], COS, SIN), {}),
        ("k.shape", (Q, K[0], COS, SIN), {}),
        (r"cos.shape=\(6, 5\) must be \[positions, at most D / 2 = 4\]", (Q, K, *tables(5, rows=6)), {}),
        (r"sin.shape=\(5, 4\) must be \(6, 4\)", (Q, K, COS, SIN[:5]), {}),
        ("cos.device=meta", (Q, K, COS.to("meta"), SIN), {}),
        ("cos.requires_grad=True must be False", (Q, K, COS.clone().requires_grad_(), SIN), {}),
        ("offset=-1 must not be negative", (Q, K, COS, SIN), {"offset": -1}),
        (r"offset=3 \+ seq_len=4 must be at most cos.shape\[0\]=6", (Q, K, COS, SIN), {"offset": 3}),
        (r"offset.shape=\(3,\) must be \(\) or \(2,\)", (Q, K, COS, SIN), {"offset": torch.zeros(3, dtype=INT)}),
        (r"offset: position 6 must be in \[0, cos.shape\[0\]=6\)", (Q, K, COS, SIN), {"offset": torch.tensor(3)}),
        ("position -1 must be", (Q, K, COS, SIN), {"offset": torch.tensor([0, -1])}),
        (r"positions.shape=\(3,\) must be \(4,\)", (Q, K, COS, SIN), {"positions": torch.zeros(3, dtype=INT)}),
        (r"positions.shape=\(2, 4\) must", (Q, K, COS, SIN), {"positions": torch.zeros(2, 4, dtype=INT)}),
        ("positions: position 6 must be", (Q, K, COS, SIN), {"positions": torch.tensor([0, 6, 1, 2])}),
        ("offset must be 0 with positions", (Q, K, COS, SIN), {"positions": torch.zeros(4, dtype=INT), "offset": 1}),
        (r"with cu_seqlens", (Q, K, COS, SIN), {"cu_seqlens": torch.tensor([0, 4])}),
        (r"must be \[n \+ 1\]", (Q[0], None, COS, SIN), {"cu_seqlens": torch.zeros(0, dtype=INT)}),
        ("must ascend from 0 to the number of tokens, 2", (Q[0], None, COS, SIN), {"cu_seqlens": torch.tensor([0, 1])}),
        ("must ascend", (Q[:, 0], None, COS, SIN), {"cu_seqlens": torch.tensor([0, 3, 2, 4])}),
        ("cu_seqlens: position 6", (Q[:, 0], None, COS, SIN), {"cu_seqlens": torch.tensor([0, 4]), "offset": 3}),
        (
            "positions must not come with cu_seqlens",
            (Q[0], None, COS, SIN),
            {"cu_seqlens": torch.tensor([0, 2]), "positions": torch.tensor([0, 1])},
        ),
    ],
)
def test_bad_arguments(wanted, arguments, keywords):
    with pytest.raises(InputError, match=wanted):
        rotary_embedding(*arguments, **keywords)


@pytest.mark.parametrize(
    ("wanted", "arguments", "keywords"),
    [
        ("q.dtype=int64", (Q.long(), None, COS, SIN), {}),
        ("k.dtype=bfloat16 must be one of: float32", (Q, K.bfloat16(), COS, SIN), {}),
        ("cos.dtype=int32", (Q, K, COS.int(), SIN), {}),
        ("sin.dtype=float16 must be one of: float32", (Q, K, COS, SIN.half()), {}),
        ("offset.dtype=int32", (Q, K, COS, SIN), {"offset": torch.tensor(1, dtype=torch.int32)}),
        ("positions.dtype=float32", (Q, K, COS, SIN), {"positions": torch.zeros(4)}),
        ("cu_seqlens.dtype=float32", (Q[0], None, COS, SIN), {"cu_seqlens": torch.zeros(2)}),
    ],
)
def test_bad_dtypes(wanted, arguments, keywords):
    with pytest.raises(TypeError, match=wanted):
        rotary_embedding(*arguments, **keywords)

"""Start here when a query sees a key that the mask hides, or does not see a key that it shows."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron import ops
from fused_megatron.checks import InputError
from fused_megatron.ops.attention import AttentionMask, attend

S, B, HEADS, D = 10, 3, 4, 6
PADDING = torch.arange(S) >= torch.tensor([[10], [7], [9]])
DOCUMENTS = torch.tensor([0, 4, 10, 13, 20, 29, 30])
MASKS = {
    "everything": AttentionMask(),
    "causal": AttentionMask(causal=True),
    "window": AttentionMask(causal=True, window=3),
    "padding": AttentionMask(key_padding_mask=PADDING),
    "causal, padding": AttentionMask(causal=True, key_padding_mask=PADDING),
    "documents": AttentionMask(documents=DOCUMENTS),
    "causal documents": AttentionMask(causal=True, documents=DOCUMENTS.int()),
    "all": AttentionMask(causal=True, window=4, key_padding_mask=PADDING, documents=DOCUMENTS),
}


def tensors(kv_heads=HEADS, dtype=torch.float64, values=D):
    generator = torch.Generator().manual_seed(2)
    shapes = [(S, B, HEADS, D), (S, B, kv_heads, D), (S, B, kv_heads, values), (S, B, HEADS, values)]
    found = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [t.requires_grad_() for t in found[:3]], found[3]


def plain(query, key, value, mask, scale=D**-0.5):
    """Attention of each query by itself, over the keys that the docstring of AttentionMask leaves visible."""
    query, value = query.double(), value.double()
    shared = query.shape[2] // key.shape[2]
    key, value = key.double().repeat_interleave(shared, 2), value.repeat_interleave(shared, 2)
    rows = []
    for i in range(S):
        row = []
        for b in range(B):
            document = None if mask.documents is None else int((mask.documents <= b * S + i).sum())
            seen = [
                j
                for j in range(S)
                if not (mask.causal and j > i)
                and not (mask.window is not None and j <= i - mask.window)
                and not (mask.key_padding_mask is not None and bool(mask.key_padding_mask[b, j]))
                and (document is None or int((mask.documents <= b * S + j).sum()) == document)
            ]
            scores = torch.einsum("nd,jnd->nj", query[i, b], key[seen, b]) * scale
            row.append(torch.einsum("nj,jnd->nd", scores.softmax(-1), value[seen, b]))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_context_and_gradients_equal_attention_query_by_query(name, kv_heads):
    mask = MASKS[name]
    (query, key, value), upstream = tensors(kv_heads)
    # A padding query may see no key: its context is not compared.
    looked_at = torch.ones(S, B, dtype=torch.bool) if mask.key_padding_mask is None else ~mask.key_padding_mask.t()
    upstream = upstream * looked_at[..., None, None]
    expected = torch.autograd.grad(plain(query, key, value, mask), (query, key, value), upstream)
    for dropout in (None, lambda probabilities, tile: probabilities * 1.0):
        context = attend(query, key, value, mask, dropout=dropout)
        torch.testing.assert_close(context[looked_at], plain(query, key, value, mask)[looked_at], rtol=1e-9, atol=1e-9)
        for found, wanted in zip(torch.autograd.grad(context, (query, key, value), upstream), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_documents_equal_attention_document_by_document(causal):
    (query, key, value), upstream = tensors(2)
    context = attend(query, key, value, AttentionMask(causal=causal, documents=DOCUMENTS))
    gradients = torch.autograd.grad(context, (query, key, value), upstream)
    for start, stop in zip(DOCUMENTS[:-1].tolist(), DOCUMENTS[1:].tolist(), strict=True):
        row, part = start // S, slice(start % S, start % S + stop - start)
        own = [t.detach()[part, row : row + 1].requires_grad_() for t in (query, key, value)]
        alone = attend(*own, AttentionMask(causal=causal))
        torch.testing.assert_close(context[part, row], alone[:, 0], rtol=1e-12, atol=1e-12)
        for whole, found in zip(gradients, torch.autograd.grad(alone, own, upstream[part, row : row + 1]), strict=True):
            torch.testing.assert_close(whole[part, row], found[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_mask_only_equals_the_kernel_of_torch_bit_for_bit(dtype):
    (query, key, value), _ = tensors(dtype=dtype)
    by_heads = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    expected = F.scaled_dot_product_attention(*by_heads, is_causal=True).permute(2, 0, 1, 3)
    assert torch.equal(attend(query, key, value, AttentionMask(causal=True)), expected)
    assert torch.equal(attend(query, key, value, AttentionMask(causal=True, window=S)), expected)


def test_scale_and_values_of_another_size():
    (query, key, value), _ = tensors(values=5)
    for dropout in (None, lambda probabilities, tile: probabilities.clone()):
        context = attend(query, key, value, AttentionMask(causal=True), scale=0.3, dropout=dropout)
        torch.testing.assert_close(context, plain(query, key, value, AttentionMask(causal=True), 0.3))


def test_a_dropped_probability_has_no_effect():
    (query, key, value), _ = tensors(2)
    context = attend(
        query,
        key,
        value,
        MASKS["causal documents"],
        dropout=lambda probabilities, tile: torch.zeros_like(probabilities),
    )
    assert context.shape == (S, B, HEADS, D) and not context.any()


def test_what_does_not_fit():
    (query, key, value), _ = tensors()
    for mask, message in [
        (AttentionMask(key_padding_mask=PADDING[:, :-1]), r"key_padding_mask.shape=\(3, 9\) must be \(3, 10\)"),
        (AttentionMask(documents=torch.tensor([0, 12])), "must be cumulative lengths from 0 to the 3 x 10 tokens"),
        (AttentionMask(documents=torch.tensor([0, 20, 10, 30])), "must be cumulative lengths"),
        (AttentionMask(documents=DOCUMENTS[None]), "must have 1 dim"),
    ]:
        with pytest.raises(InputError, match=message):
            attend(query, key, value, mask)
    with pytest.raises(InputError, match="4 heads, not a multiple of the 3 of key"):
        attend(query, key[:, :, :3], value[:, :, :3], AttentionMask())
    with pytest.raises(InputError, match=r"value\.shape"):
        attend(query, key, value[1:], AttentionMask())
    with pytest.raises(TypeError, match=r"key_padding_mask\.dtype=int64"):
        attend(query, key, value, AttentionMask(key_padding_mask=PADDING.long()))
    with pytest.raises(InputError, match="window=3 needs causal=True"):
        AttentionMask(window=3)
    with pytest.raises(InputError, match="window=0 must be at least 1"):
        AttentionMask(causal=True, window=0)


def packed(dtype=torch.float32):
    (query, key, value), upstream = tensors(2, dtype)
    return [query, key, value], upstream


def test_documents_of_one_row_without_a_batch_dim():
    (query, key, value), _ = packed()
    whole = ops.attention(query[:, :1], key[:, :1], value[:, :1], documents=[0, 4, 10], causal=True)
    rows = [t[:, 0] for t in (query, key, value)]
    context, log_sum_exp = ops.attention(*rows, documents=[0, 4, 10], causal=True, return_log_sum_exp=True)
    assert torch.equal(context, whole[:, 0])
    scores = torch.einsum("ind,jnd->nij", rows[0][4:], rows[1][4:].repeat_interleave(2, 1)) * D**-0.5
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    torch.testing.assert_close(log_sum_exp[4:].t(), scores.masked_fill(hidden, float("-inf")).logsumexp(-1))
    assert not log_sum_exp.requires_grad


@pytest.mark.parametrize("window", [None, 3])
def test_the_op_in_torch_library_and_under_compile(window):
    (query, key, value), upstream = packed()
    documents = torch.tensor([0, 4, 10, 30])
    detached = [t.detach() for t in (query, key, value)]
    op = torch.ops.fused_megatron.attention_forward.default
    torch.library.opcheck(op, (*detached, documents, None, True, window, 0.4))
    context, log_sum_exp = op(*detached, documents, None, True, window, 0.4)
    backward = torch.ops.fused_megatron.attention_backward.default
    saved = (documents, None, context, log_sum_exp)
    torch.library.opcheck(backward, (upstream, *detached, *saved, True, window, 0.4))

    def step(*operands):
        context = ops.attention(*operands, documents=documents, causal=True, window=window)
        return [context, *torch.autograd.grad(context, operands, upstream)]

    compiled = torch.compile(
        lambda *operands: ops.attention(*operands, documents=documents, causal=True, window=window), fullgraph=True
    )
    context = compiled(query, key, value)
    found = [context, *torch.autograd.grad(context, (query, key, value), upstream)]
    for one, other in zip(found, step(query, key, value), strict=True):
        assert torch.equal(one, other)


def test_what_attention_refuses():
    (query, key, value), _ = packed()
    for documents in ([0, 12], [0, 20, 10, 30], [3, 30], []):
        with pytest.raises(InputError, match="must be cumulative lengths from 0 to the 3 x 10 tokens"):
            ops.attention(query, key, value, documents=documents)
    with pytest.raises(InputError, match=r"query.shape=\(4, 6\) must be \(S, B, N, D\) or \(T, N, D\)"):
        ops.attention(query[0, 0], key[0, 0], value[0, 0])
    with pytest.raises(InputError, match="window=3 needs causal=True"):
        ops.attention(query, key, value, window=3)

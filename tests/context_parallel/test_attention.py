"""Start here when attention over context-parallel ranks differs from attention on one rank."""

from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fused_megatron.checks import InputError, SharedInputError
from fused_megatron.context_parallel import METHODS, context_parallel_attention, partition_for
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.sharding import SequencePartition
from fused_megatron.testing import run_cases_on_ranks, run_on_ranks


class Case(NamedTuple):
    """Sizes and mask of one attention; documents: "random" or None; padding: "some", "first" or None."""

    seq_len: int
    batch: int
    heads: int
    kv_heads: int
    causal: bool = True
    window: int | None = None
    documents: str | None = None
    padding: str | None = None
    dropout: float = 0.0
    value_dim: int = 8
    dtype: torch.dtype = torch.float32


CASES = {
    "one causal document": Case(64, 1, 4, 4),
    "documents and grouped heads": Case(61, 2, 8, 2, documents="random"),
    "one key-value head, window below a part": Case(53, 1, 4, 1, window=5),
    "window beyond a part, documents": Case(67, 2, 4, 2, window=45, documents="random"),
    "both directions, padding": Case(37, 3, 4, 4, causal=False, padding="some"),
    "both directions, documents, wide values": Case(50, 2, 4, 2, causal=False, documents="random", value_dim=12),
    "queries that see nothing": Case(32, 2, 4, 2, padding="first"),
    "three key-value heads": Case(45, 1, 12, 3, documents="random"),
    "dropout": Case(43, 2, 4, 2, documents="random", dropout=0.3),
    "dropout, both directions, padding": Case(31, 2, 8, 1, causal=False, padding="some", dropout=0.2),
    "long documents": Case(1800, 1, 4, 2, documents="random"),
    "bfloat16": Case(181, 2, 4, 2, documents="random", dtype=torch.bfloat16),
}
HEAD_DIM = 8


def inputs(case):
    """Draw query, key, value and the gradient of the result [S, B, heads, ..], cumulative lengths, padding, kept."""
    generator = torch.Generator().manual_seed(case.seq_len)
    draw = partial(torch.randn, case.seq_len, case.batch, generator=generator)
    tensors = [draw(case.heads, HEAD_DIM), draw(case.kv_heads, HEAD_DIM)]
    tensors += [draw(case.kv_heads, case.value_dim), draw(case.heads, case.value_dim)]
    documents = padding = None
    if case.documents:
        ends = torch.randint(0, case.seq_len * case.batch, (3 * case.batch,), generator=generator)
        starts_of_rows = torch.arange(case.batch + 1) * case.seq_len
        documents = torch.cat([ends, ends[:2] + 1, starts_of_rows]).unique()  # single tokens among them
    if case.padding == "some":
        padding = torch.arange(case.seq_len) >= torch.randint(1, case.seq_len, (case.batch, 1), generator=generator)
    if case.padding == "first":
        padding = (torch.arange(case.seq_len) < case.seq_len * 5 // 8).expand(case.batch, -1).contiguous()
    scores = (case.batch, case.heads, case.seq_len, case.seq_len)
    kept = torch.rand(scores, generator=generator) >= case.dropout if case.dropout else None
    return [x.to(case.dtype) for x in tensors], documents, padding, kept


def visible_pairs(case, documents, padding):
    """Return [B, S, S] bool, True where a query sees a key: pair by pair."""
    document = torch.zeros(case.batch, case.seq_len, dtype=torch.int64)
    if documents is not None:
        document = (torch.arange(case.batch * case.seq_len)[:, None] >= documents).sum(1).view(document.shape)
    distance = torch.arange(case.seq_len)[:, None] - torch.arange(case.seq_len)
    seen = document[:, :, None] == document[:, None, :]
    if case.causal:
        seen = seen & (distance >= 0) & (distance < (case.window or case.seq_len))
    return seen if padding is None else seen & ~padding[:, None, :]


@cache
def dense(name):
    """Return the context and the gradients of query, key and value in float64, and torch's in the case's dtype."""
    case = CASES[name]
    (query, key, value, grad), documents, padding, kept = inputs(case)
    seen = visible_pairs(case, documents, padding)[:, None]
    shared = case.heads // case.kv_heads

    def exact(query, key, value):
        query, key, value = (x.double().permute(1, 2, 0, 3) for x in (query, key, value))
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
        scores = (query @ key.mT / HEAD_DIM**0.5).masked_fill(~seen, -1e300)
        probabilities = scores.softmax(-1) * seen
        if kept is not None:
            probabilities = probabilities * kept / (1 - case.dropout)
        return (probabilities @ value).permute(2, 0, 1, 3)

    def by_torch(query, key, value):
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True).permute(2, 0, 1, 3)

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        context = function(*leaves)
        return [context.detach(), *torch.autograd.grad(context, leaves, grad.to(context.dtype))]

    has_yardstick = kept is None and case.value_dim == HEAD_DIM
    return run(exact, torch.float64), run(by_torch, case.dtype) if has_yardstick else None


def on_ranks(rank, ranks, name, method):
    """Return the positions of a rank, and its context and gradients, after running twice."""
    case = CASES[name]
    (query, key, value, grad), documents, padding, kept = inputs(case)
    mask = AttentionMask(case.causal, case.window, None, documents)
    sizes = {"num_heads": case.heads, "num_kv_heads": case.kv_heads}
    partition = partition_for(method, mask, case.batch, case.seq_len, ranks, **sizes)
    layout = partition.layouts[rank]
    if padding is not None:
        mask = AttentionMask(case.causal, case.window, layout.take(padding, 1), documents)

    def drop(probabilities, tile, first_head):
        heads = slice(first_head, first_head + probabilities.shape[1])
        rows = slice(tile.query_position, tile.query_position + tile.num_queries)
        columns = slice(tile.key_position, tile.key_position + tile.num_keys)
        return probabilities * kept[slice(*tile.samples), heads, rows, columns] / (1 - case.dropout)

    def run():
        leaves = [layout.take(x).detach().requires_grad_() for x in (query, key, value)]
        options = {"partition": partition, "method": method, "group": dist.group.WORLD}
        context = context_parallel_attention(*leaves, mask, **options, dropout=drop if case.dropout else None)
        return [context.detach(), *torch.autograd.grad(context, leaves, layout.take(grad))]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "not repeatable"
    return layout.positions(), first


def relative_error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


# With 2 ranks the fast part has a case of each kind: both directions, a window, dropout, few heads, two dtypes.
FEW = ("one causal document", "window beyond a part, documents", "dropout, both directions, padding", "bfloat16")


@pytest.mark.parametrize(
    ("ranks", "names"), [(2, FEW), (4, tuple(CASES)), pytest.param(2, tuple(CASES), marks=pytest.mark.slow)]
)
def test_context_and_gradients_are_those_of_dense_attention(ranks, names):
    cases = [(name, method) for name in names for method in METHODS]
    for (name, method), results in zip(cases, run_cases_on_ranks(on_ranks, ranks, cases), strict=True):
        exact, by_torch = dense(name)
        positions = torch.cat([positions for positions, _ in results])
        assert positions.sort().values.equal(torch.arange(CASES[name].seq_len))
        for index, what in enumerate(("context", "query", "key", "value")):
            got = torch.cat([tensors[index] for _, tensors in results])[positions.argsort()]
            error, where = relative_error(got, exact[index]), f"{what} of {name!r} by {method} on {ranks} ranks"
            if CASES[name].dtype == torch.float32:
                assert error <= 2e-6, f"{where}: {error:.1e}"
            if by_torch is not None:
                # Torch's error may be a lucky one where it rounds little: a third of a unit in the last place at least.
                theirs = max(relative_error(by_torch[index], exact[index]), torch.finfo(got.dtype).eps / 3)
                assert error <= 2 * theirs, f"{where}: {error:.1e}, torch {theirs:.1e}"


def bad_calls(rank, ranks):
    """Return the error of each bad call on this rank; none of them may wait for the other ranks."""
    partition = SequencePartition.contiguous(10, ranks)
    mask, group = AttentionMask(causal=True), dist.group.WORLD
    rows = partition.sizes[rank]

    def error(heads=3, kv_heads=3, rows=rows, dtype=torch.float32, mask=mask, partition=partition, method="ring"):
        query, key = torch.zeros(rows, 2, heads, 8), torch.zeros(rows, 2, kv_heads, 8, dtype=dtype)
        if rank == 1:
            return None
        try:
            context_parallel_attention(query, key, key, mask, partition=partition, method=method, group=group)
        except (InputError, TypeError) as failure:
            return type(failure), str(failure)

    documents = AttentionMask(True, documents=torch.tensor([0, 5, 10]))
    return [
        error(method="zigzag"),
        error(method="all_to_all"),
        error(kv_heads=2),
        error(partition=SequencePartition.contiguous(10, 1)),
        error(rows=4),
        error(dtype=torch.float64),
        error(mask=documents),
        error(mask=AttentionMask(key_padding_mask=torch.zeros(2, 10, dtype=torch.bool))),
    ]


def test_bad_calls_are_one_line_before_any_communication():
    errors = run_on_ranks(bad_calls, 2)[0]
    wanted = [
        (SharedInputError, "context_parallel_method='zigzag' must be one of: 'ring', 'all_gather', 'all_to_all'"),
        (SharedInputError, "num_heads=3 of a tensor-parallel rank by context_parallel_size=2 (use 'ring', 'all_g"),
        (SharedInputError, "query has 3 heads, which must be a multiple of the 2 heads of key"),
        (SharedInputError, "partition.num_ranks=1 must be the size of the context-parallel group, 2"),
        (SharedInputError, "query.shape=(4, 2, 3, 8) must be (5, 2, 3, 8)"),
        (TypeError, "key.dtype=float64 must be one of: float32"),
        (SharedInputError, "documents=[0, 5, 10] must be cumulative lengths from 0 to the 2 x 10 tokens"),
        (SharedInputError, "key_padding_mask.shape=(2, 10) must be (2, 5)"),
    ]
    for error, (kind, text) in zip(errors, wanted, strict=True):
        assert error is not None and error[0] is kind and text in error[1] and "\n" not in error[1], error

"""Start here when the fused head and loss differ between tensor-parallel sizes."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.ops import linear_cross_entropy_tile_shape as shapes
from fused_megatron.sharding import update_record
from fused_megatron.tensor_parallel import vocab_parallel_linear_cross_entropy
from fused_megatron.testing import assert_close, run_cases_on_ranks, run_on_ranks
from fused_megatron.testing.tolerances import assert_close_to_reference

S, B, H = 8, 3, 20


def problem(vocab, padded, dtype, bias):
    """Return hidden, weight, bias, target and the gradient of the losses, the same on every rank."""
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(S, B, H, generator=generator).to(dtype)
    weight = (torch.randn(padded, H, generator=generator) * 0.5).to(dtype)
    bias = torch.randn(padded, generator=generator).to(dtype) if bias else None
    target = torch.randint(0, vocab, (S, B), generator=generator)
    target[0, :2] = torch.tensor([0, vocab - 1])
    target[2, 1] = target[7, 0] = target[7, 1] = -100  # a mask that is uneven over the sequence
    return hidden, weight, bias, target, torch.randn(S, B, generator=generator)


def by_torch(hidden, weight, bias, target, d_loss, dtype, vocab, smoothing, z_loss):
    """Return losses and gradients of the full logits, by torch's own ops on one rank."""
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logits = F.linear(*leaves).flatten(0, 1)[:, :vocab]
    ids = target.flatten()
    loss = F.cross_entropy(logits, ids, reduction="none", label_smoothing=smoothing)
    loss = loss + z_loss * torch.logsumexp(logits, -1).square() * (ids != -100)
    gradients = torch.autograd.grad(loss, leaves, d_loss.flatten().to(dtype))
    return loss.detach().view(S, B), *gradients


class Recorded(record_communication):
    """record_communication that also records products, which write into buffers here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.order.append("mm")
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def expected_order(ranks, sequence_parallel, chunks):
    """Return the order of work: each collective comes before the product that hides it."""
    gather, reduce = ["all_gather"], ["reduce_scatter" if sequence_parallel else "all_reduce"]
    hidden = gather if sequence_parallel else []  # of the next chunk's tokens
    stats = gather
    forward, backward = list(hidden), list(hidden)
    for chunk in range(chunks):
        following = hidden if chunk + 1 < chunks else []
        forward += [*following, "mm", *stats]
        backward += [*following, "mm", "mm", *reduce, "mm"]  # logits, dx, dw
    if ranks > 1:
        return forward, backward
    return ["mm"] * chunks, ["mm"] * 3 * chunks


def expected_order_of_sum(ranks, sequence_parallel, chunks):
    """Return the order of work for "sum": all in forward; the statistics of a chunk hide under the next product."""
    if ranks == 1:
        return ["mm"] * 3 * chunks
    hidden, reduction = ["all_gather"] * sequence_parallel, "reduce_scatter" if sequence_parallel else "all_reduce"
    gradients, order = ["mm", reduction, "mm"], list(hidden)  # dx, dw
    for chunk in range(chunks):
        order += [*(hidden if chunk + 1 < chunks else []), "mm", "all_gather", *(gradients if chunk else [])]
    return order + gradients


def check_loss(loss, exact, rough, product_dtype):
    """Allow no rounding of logits where products are float32; a CPU with matrix units rounds them, as torch does."""
    if product_dtype == torch.float32:
        assert_close("loss", loss, exact)
    else:
        assert_close_to_reference(loss, exact, rough, name="loss")


def head_case(rank, ranks, sequence_parallel, vocab, padded, smoothing, z_loss, dtype, bias, chunk_tokens):
    group = dist.group.WORLD if ranks > 1 else None
    sequence_parallel = sequence_parallel and ranks > 1
    full = problem(vocab, padded, dtype, bias)
    hidden, weight, bias, target, d_loss = full
    mine = slice(rank * padded // ranks, (rank + 1) * padded // ranks)
    own = slice(rank * S // ranks, (rank + 1) * S // ranks) if sequence_parallel else slice(None)
    if chunk_tokens == "by bytes":  # of the shard, also where it is all padding: every rank must make the same chunks
        shapes._ALIGNMENT, shapes._TILE_BYTES = 4, {"cpu": 9 * padded // ranks * 4}
    # Padding must not be read: a NaN there would spread.
    shards = [x.clone() for x in (weight, bias) if x is not None]
    for x in shards:
        x[vocab:] = torch.nan
    leaves = [x.requires_grad_() for x in (hidden[own].clone(), *(x[mine].clone() for x in shards))]
    before = [x.detach().clone() for x in leaves]
    form = {
        "tp_group": group, "vocab_size": vocab, "padded_vocab_size": padded, "label_smoothing": smoothing,
        "bias_shard": leaves[2] if bias is not None else None, "z_loss": z_loss, "sequence_parallel": sequence_parallel,
        "chunk_tokens": None if chunk_tokens == "by bytes" else chunk_tokens,
    }  # fmt: skip
    with Recorded() as forward:
        loss = vocab_parallel_linear_cross_entropy(*leaves[:2], target, **form)
    with Recorded() as backward:
        gradients = torch.autograd.grad(loss, leaves, d_loss)
    assert loss.dtype == torch.float32
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(leaves, before, strict=True))

    chunks = 3 if chunk_tokens == "by bytes" else -(-S * B // (chunk_tokens or S * B))
    assert (forward.order, backward.order) == expected_order(ranks, sequence_parallel, chunks)
    if ranks > 1:  # 3 float32 a token; and hidden, in the dtype of hidden
        assert forward.elements["all_gather"] == 3 * S * B + sequence_parallel * S * B // ranks * H
        reduction = "reduce_scatter" if sequence_parallel else "all_reduce"
        assert backward.elements[reduction] == S * B * H
        assert backward.elements["all_gather"] == sequence_parallel * S * B // ranks * H

    exact = by_torch(*full, torch.float64, vocab, smoothing, z_loss)
    rough = by_torch(*full, dtype, vocab, smoothing, z_loss)
    check_loss(loss.detach(), exact[0], rough[0], shapes.product_dtype(hidden))
    names, cuts = ("dhidden", "dweight", "dbias"), (own, mine, mine)
    for name, gradient, right, their, cut in zip(names, gradients, exact[1:], rough[1:], cuts, strict=False):
        assert gradient.dtype == dtype
        assert_close(name, gradient, right[cut], their[cut], ranks=ranks)

    # The sum: one random upstream gradient for all tokens.
    upstream = torch.full((S, B), 0.37)
    with Recorded() as forward:
        total = vocab_parallel_linear_cross_entropy(*leaves[:2], target, **form, reduction="sum")
    with Recorded() as backward:
        gradients = torch.autograd.grad(total, leaves, upstream[0, 0].double())
    if dtype == torch.float32:  # products of bfloat16 are cast in blocks of the vocabulary, and run again in backward
        halves = 6 if chunk_tokens == "by bytes" and ranks > 1 else chunks  # two tiles in the same memory
        assert (forward.order, backward.order) == (expected_order_of_sum(ranks, sequence_parallel, halves), [])
    assert total.dtype == torch.float64 and total.shape == ()
    torch.testing.assert_close(total.detach(), loss.detach().double().sum(), rtol=1e-12, atol=0)
    exact, rough = (by_torch(*full[:4], upstream, kind, vocab, smoothing, z_loss) for kind in (torch.float64, dtype))
    for name, gradient, right, their, cut in zip(names, gradients, exact[1:], rough[1:], cuts, strict=False):
        assert gradient.dtype == dtype
        assert_close(f"{name} of the sum", gradient, right[cut], their[cut], ranks=ranks)
    return torch.cat([loss.detach().flatten().double(), total.detach().view(1)])


# 33 of 64 vocabulary entries on 4 ranks: the last rank has padding only. Chunks of 12 of 24 tokens; of 8 with a smaller
# last one, with one row on each rank under 4-way sequence parallelism; one chunk.
FORMS = [  # vocab, padded, smoothing, z_loss, dtype, bias, chunk_tokens
    (64, 64, 0.0, 0.0, torch.float32, True, 12),
    (53, 64, 0.1, 1e-2, torch.float32, False, 8),
    (33, 64, 0.3, 0.0, torch.float32, True, None),
    (33, 64, 0.1, 1e-3, torch.bfloat16, True, 12),
    (33, 64, 0.0, 0.0, torch.float32, False, "by bytes"),  # last: it changes the module of its ranks
]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_losses_and_gradients(ranks):
    cases = [(sequence_parallel, *form) for form in FORMS for sequence_parallel in (False, True)[:ranks]]
    for case, losses in zip(cases, run_cases_on_ranks(head_case, ranks, cases), strict=True):
        assert all(torch.equal(loss, losses[0]) for loss in losses), case


def common_case(rank, ranks, sequence_parallel):
    """Make logits with a large common part from numbers with exact float32 products, so that only the loss can err."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-4, 5, (S, B, H), generator=generator) / 2
    weight = torch.randint(-4, 5, (64, H), generator=generator) / 2
    target = torch.randint(0, 53, (S, B), generator=generator)
    own = slice(rank * S // ranks, (rank + 1) * S // ranks) if sequence_parallel else slice(None)
    mine = slice(rank * 64 // ranks, (rank + 1) * 64 // ranks)
    for common, smoothing in [(0.0, 0.1), (1e5, 0.0), (-1e6, 0.1)]:
        bias = torch.full((64,), common)
        leaf = hidden[own].clone().requires_grad_()
        loss = vocab_parallel_linear_cross_entropy(
            leaf,
            weight[mine],
            target,
            tp_group=dist.group.WORLD if ranks > 1 else None,
            vocab_size=53,
            padded_vocab_size=64,
            bias_shard=bias[mine],
            label_smoothing=smoothing,
            chunk_tokens=12,
            sequence_parallel=sequence_parallel,
        )
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        exact = by_torch(hidden, weight, bias, target, torch.ones(S, B), torch.float64, 53, smoothing, 0.0)
        torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient.double(), exact[1][own], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, False), (2, True), (4, False)])
def test_what_all_logits_have_in_common_costs_no_precision(ranks, sequence_parallel):
    run_on_ranks(common_case, ranks, sequence_parallel)


def frozen_case(rank, ranks):
    hidden, weight, _, target, d_loss = problem(64, 64, torch.float32, False)
    options = {"tp_group": dist.group.WORLD, "vocab_size": 64, "chunk_tokens": 12}
    mine = weight.chunk(ranks)[rank].clone().requires_grad_()
    with record_communication() as seen:
        loss = vocab_parallel_linear_cross_entropy(hidden, mine, target, **options)
        (gradient,) = torch.autograd.grad(loss, mine, d_loss)
    assert seen.counts == {"all_gather": 2}  # hidden has no gradient, and nothing is reduced
    leaf = hidden.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        cast = vocab_parallel_linear_cross_entropy(leaf, mine, target, **options)
    assert cast.dtype == torch.float32
    with record_communication() as seen:
        d_hidden, d_weight = torch.autograd.grad(cast, (leaf, mine), d_loss)
    assert d_hidden.dtype == d_weight.dtype == torch.float32 and seen.counts == {"all_reduce": 2}
    exact = by_torch(hidden, weight, None, target, d_loss, torch.float64, 64, 0.0, 0.0)
    assert_close("dweight", gradient, exact[2].chunk(ranks)[rank])
    # bfloat16 has 8 bits, of the operands and of the partial sums of dhidden.
    torch.testing.assert_close(d_hidden.double(), exact[1], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(d_weight.double(), exact[2].chunk(ranks)[rank], rtol=2e-2, atol=2e-2)
    again = vocab_parallel_linear_cross_entropy(leaf, mine, target, **options)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(again.sum(), leaf, create_graph=True)
    return True


def test_frozen_hidden_and_autocast():
    assert all(run_on_ranks(frozen_case, 2))


def sum_case(rank, ranks):
    """Check the gradients kept from forward to backward: scaled, added to main_grad only in backward, made again."""
    hidden, weight, bias, target, _ = problem(53, 64, torch.float32, True)
    leaves = [hidden.requires_grad_(), *(x.chunk(ranks)[rank].clone().requires_grad_() for x in (weight, bias))]
    options = {"tp_group": dist.group.WORLD, "vocab_size": 53, "bias_shard": leaves[2], "chunk_tokens": 12}
    start = torch.randn(leaves[1].shape)
    main_grad = start.clone()
    update_record(leaves[1], main_grad=lambda: main_grad)
    total = vocab_parallel_linear_cross_entropy(*leaves[:2], target, reduction="sum", **options)
    assert torch.equal(main_grad, start)  # nothing is added before backward
    first = torch.autograd.grad(total / 7, leaves, retain_graph=True, allow_unused=True)
    assert first[1] is None
    added = main_grad - start
    second = torch.autograd.grad(total / 7, leaves, allow_unused=True)
    exact = by_torch(hidden.detach(), weight, bias, target, torch.full((S, B), 1 / 7), torch.float64, 53, 0.0, 0.0)
    for dhidden, dweight, dbias in [
        (first[0], added, first[2]),
        (second[0], main_grad - start - added, second[2]),
    ]:
        assert_close("dhidden", dhidden, exact[1])
        torch.testing.assert_close(dweight.double(), exact[2].chunk(ranks)[rank], rtol=1e-5, atol=1e-6)
        assert_close("dbias", dbias, exact[3].chunk(ranks)[rank])
    with torch.no_grad(), Recorded() as seen:
        same = vocab_parallel_linear_cross_entropy(*leaves[:2], target, reduction="sum", **options)
    assert seen.order == ["mm", "all_gather"] * 2 and torch.equal(same, total.detach())
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        again = vocab_parallel_linear_cross_entropy(*leaves[:2], target, reduction="sum", **options)
        torch.autograd.grad(again, leaves[0], create_graph=True)
    with pytest.raises(InputError, match="reduction='mean' must be one of: 'none', 'sum'"):
        vocab_parallel_linear_cross_entropy(*leaves[:2], target, reduction="mean", **options)
    return True


def test_sum_is_held_until_backward():
    assert all(run_on_ranks(sum_case, 2))


def blocks_case(rank, ranks):
    """Choose tiles that hold the whole vocabulary for the tokens of one rank, but not for the tokens of all ranks."""
    shapes.product_dtype = lambda operand: torch.float32
    shapes._CAST_TILE_BYTES = S * B // ranks * 128 * 4
    hidden, weight, _, target, _ = problem(256, 256, torch.bfloat16, False)
    leaves = [x.clone().requires_grad_() for x in (hidden.chunk(ranks)[rank], weight.chunk(ranks)[rank])]
    options = {"tp_group": dist.group.WORLD, "vocab_size": 256, "sequence_parallel": True}
    total = vocab_parallel_linear_cross_entropy(*leaves, target, reduction="sum", **options)
    gradients = torch.autograd.grad(total, leaves)
    upstream = torch.ones(S, B)
    exact, rough = (
        by_torch(hidden, weight, None, target, upstream, kind, 256, 0.0, 0.0) for kind in (torch.float64, hidden.dtype)
    )
    for name, gradient, right, their in zip(("dhidden", "dweight"), gradients, exact[1:], rough[1:], strict=True):
        assert_close(name, gradient, right.chunk(ranks)[rank], their.chunk(ranks)[rank], ranks=ranks)
    return True


def test_blocks_of_the_vocabulary_under_sequence_parallelism():
    assert all(run_on_ranks(blocks_case, 2))


def double_case(rank, ranks):
    hidden, weight, bias, target, d_loss = problem(53, 64, torch.float64, True)
    leaves = [hidden.requires_grad_(), *(x.chunk(ranks)[rank].clone().requires_grad_() for x in (weight, bias))]
    loss = vocab_parallel_linear_cross_entropy(
        *leaves[:2], target, tp_group=dist.group.WORLD, vocab_size=53, bias_shard=leaves[2], z_loss=1e-2
    )
    gradients = torch.autograd.grad(loss, leaves, d_loss.double())
    exact = by_torch(hidden.detach(), weight, bias, target, d_loss, torch.float64, 53, 0.0, 1e-2)
    own = [lambda x: x, *[lambda x: x.chunk(ranks)[rank]] * 2]
    for our, right, cut in zip((loss.detach(), *gradients), exact, [lambda x: x, *own], strict=True):
        torch.testing.assert_close(our, cut(right), rtol=1e-10, atol=1e-12)
    total = vocab_parallel_linear_cross_entropy(
        *leaves[:2], target, tp_group=dist.group.WORLD, vocab_size=53, bias_shard=leaves[2], reduction="sum"
    )
    gradients = torch.autograd.grad(total, leaves)
    exact = by_torch(hidden.detach(), weight, bias, target, torch.ones(S, B), torch.float64, 53, 0.0, 0.0)
    for our, right, cut in zip(gradients, exact[1:], own, strict=True):
        torch.testing.assert_close(our, cut(right), rtol=1e-10, atol=1e-12)
    return True


def test_float64():
    assert all(run_on_ranks(double_case, 2))


def errors(rank, ranks):
    hidden, weight, target = torch.randn(4, 3, H), torch.randn(32, H), torch.ones(4, 3, dtype=torch.int64)
    found = []
    for change in [
        {"weight_shard": torch.randn(64, H)},
        {"weight_shard": torch.randn(16, H)},
        {"padded_vocab_size": 128},
        {"sequence_parallel": True},
        {"target": target + 59 * (target.cumsum(1) == 3)},
        {"bias_shard": torch.randn(64)},
    ]:
        arguments = {"hidden": hidden, "weight_shard": weight, "target": target, **change}
        with pytest.raises(InputError) as info, record_communication() as seen:
            vocab_parallel_linear_cross_entropy(**arguments, tp_group=dist.group.WORLD, vocab_size=60)
        assert not seen.counts
        found.append(str(info.value))
    return found


def test_errors_on_every_rank():
    for found in run_on_ranks(errors, 2):
        assert "pass this rank's rows, not the whole weight" in found[0]
        assert found[1] == "weight_shard.shape[0]=16 x tensor_parallel_size=2 must be at least vocab_size=60"
        assert "must equal padded_vocab_size=128" in found[2]
        assert found[3] == "target.shape=(4, 3) must be (8, 3)"
        assert "target[2]=60 must be in [0, 60)" in found[4]
        assert found[5] == "bias.shape=(64,) must be (32,)"

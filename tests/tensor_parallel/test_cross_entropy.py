"""Start here when the vocab-parallel loss differs from the loss of the full logits."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.tensor_parallel import vocab_parallel_cross_entropy
from fused_megatron.testing import assert_close, run_cases_on_ranks, run_on_ranks

S, B = 7, 3


def reference(logits, target, smoothing, z_loss, softcap):
    """Return torch's loss of the columns without padding, plus the z term, and its gradient."""
    flat, ids = logits.flatten(0, 1), target.flatten()
    flat = flat if softcap is None else softcap * (flat / softcap).tanh()
    loss = F.cross_entropy(flat, ids, reduction="none", label_smoothing=smoothing)
    z = torch.logsumexp(flat, -1).square() * z_loss
    return (loss + z.where(ids != -100, 0)).view(target.shape)


def loss_case(rank, ranks, vocab, padded, smoothing, z_loss, softcap, inplace, dtype, scale):
    group = dist.group.WORLD if ranks > 1 else None
    generator = torch.Generator().manual_seed(vocab)
    logits = (scale * torch.randn(S, B, padded, generator=generator)).to(dtype)
    target = torch.randint(0, vocab, (S, B), generator=generator)
    target[0, :2] = torch.tensor([0, vocab - 1])
    target[2, 1] = target[6, 0] = -100  # a mask that is uneven over the sequence
    d_loss = torch.randn(S, B, generator=generator)

    def by_torch(dtype):
        x = logits[..., :vocab].to(dtype).requires_grad_()
        loss = reference(x, target, smoothing, z_loss, softcap)
        gradient = torch.autograd.grad(loss, x, d_loss.to(dtype))[0]
        return loss.detach(), F.pad(gradient, (0, padded - vocab))

    # Padding must not be read: a NaN there would spread.
    full = logits.clone()
    full[..., vocab:] = torch.nan
    columns = padded // ranks
    mine = slice(rank * columns, (rank + 1) * columns)
    shard = full[..., mine].requires_grad_()  # not contiguous
    with record_communication() as forward:
        form = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap, "inplace_backward": inplace}
        loss = vocab_parallel_cross_entropy(shard, target, tp_group=group, vocab_size=vocab, **form)
    with record_communication() as backward:
        (gradient,) = torch.autograd.grad(loss, shard, d_loss)
    assert forward.counts == ({"all_gather": 1} if ranks > 1 else {}) and not backward.counts
    assert forward.elements["all_gather"] == (3 * S * B if ranks > 1 else 0)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    whole = F.pad(logits[..., :vocab], (0, padded - vocab), value=7)
    whole[..., mine] = torch.where(torch.tensor(inplace), gradient, whole[..., mine])
    assert torch.equal(full.nan_to_num(7), whole)
    expected, expected_gradient = by_torch(torch.float64)
    assert_close("loss", loss.detach(), expected)
    assert loss[2, 1] == 0 and not gradient[2, 1].any() and not gradient[6, 0].any()
    assert_close("gradient", gradient, expected_gradient[..., mine], by_torch(dtype)[1][..., mine])
    return loss.detach()


# 33 of 64 vocabulary entries on 4 ranks: the last rank has padding only.
VOCABULARIES = [(64, 64), (53, 64), (33, 64)]
FORMS = [  # smoothing, z_loss, softcap, inplace, dtype, scale
    (0.0, 0.0, None, False, torch.float32, 1.0),
    (0.1, 1e-2, 4.0, True, torch.float32, 3.0),
    (0.3, 0.0, None, False, torch.float32, 1000.0),
    (0.1, 0.0, None, True, torch.bfloat16, 3.0),
]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_loss_and_gradient(ranks):
    cases = [(*vocabulary, *form) for vocabulary, form in itertools.product(VOCABULARIES, FORMS)]
    for case, losses in zip(cases, run_cases_on_ranks(loss_case, ranks, cases), strict=True):
        assert all(torch.equal(loss, losses[0]) for loss in losses), case


def common_case(rank, ranks):
    """Make logits with a large common part; 33 of 64 vocabulary entries, so that one of 4 shards has padding only."""
    generator = torch.Generator().manual_seed(0)
    logits, target = 3 * torch.randn(12, 64, generator=generator), torch.randint(0, 33, (12,), generator=generator)
    group, mine = dist.group.WORLD if ranks > 1 else None, slice(rank * 64 // ranks, (rank + 1) * 64 // ranks)
    for common, smoothing in itertools.product((0.0, 1e4, 1e5, -1e6), (0.0, 0.1)):
        shard = (logits + common)[:, mine].requires_grad_()
        loss = vocab_parallel_cross_entropy(
            shard, target, tp_group=group, vocab_size=33, padded_vocab_size=64, label_smoothing=smoothing
        )
        (gradient,) = torch.autograd.grad(loss.sum(), shard)
        x = (logits + common)[:, :33].double().requires_grad_()
        exact = F.cross_entropy(x, target, reduction="none", label_smoothing=smoothing)
        (exact_gradient,) = torch.autograd.grad(exact.sum(), x)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
        exact_gradient = F.pad(exact_gradient, (0, 31))[:, mine]
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_all_logits_have_in_common_costs_no_precision(ranks):
    run_on_ranks(common_case, ranks)


def double(rank, ranks):
    torch.manual_seed(0)
    logits, target = torch.randn(4, 10, dtype=torch.float64), torch.tensor([1, 9, 0, 4])
    loss = vocab_parallel_cross_entropy(
        logits.chunk(ranks, -1)[rank], target, tp_group=dist.group.WORLD, vocab_size=10, label_smoothing=0.2
    )
    expected = F.cross_entropy(logits, target, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_float64():
    run_on_ranks(double, 2)


def errors(rank, ranks):
    found = []
    target = torch.tensor([1, 2])
    for logits, ids in [
        (torch.randn(2, 10), target),
        (torch.randn(2, 4), target),
        (torch.randn(3, 5), target),
        (torch.randn(2, 5), torch.tensor([1, 10])),
    ]:
        with pytest.raises(InputError) as info, record_communication() as seen:
            vocab_parallel_cross_entropy(logits, ids, tp_group=dist.group.WORLD, vocab_size=10)
        assert not seen.counts
        found.append(str(info.value))
    return found


def test_errors_on_every_rank():
    for found in run_on_ranks(errors, 2):
        assert "pass this rank's columns, not the gathered logits" in found[0]
        assert found[1] == "logits_shard.shape[-1]=4 x tensor_parallel_size=2 must be at least vocab_size=10"
        assert found[2] == "target.shape=(2,) must be (3,)"
        assert "target[1]=10 must be in [0, 10)" in found[3]


def tiny_vocabulary(rank, ranks):
    logits, target = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    shape = {"tp_group": dist.group.WORLD, "vocab_size": 3, "padded_vocab_size": 8}
    with pytest.raises(InputError, match="x tensor_parallel_size=2 must equal padded_vocab_size=8"):
        vocab_parallel_cross_entropy(logits, target, **shape)
    loss = vocab_parallel_cross_entropy(logits.chunk(ranks, -1)[rank], target, **shape)
    return loss, F.cross_entropy(logits[:, :3], target, reduction="none")


def test_padded_vocabulary_tells_shards_from_gathered_logits():
    for loss, expected in run_on_ranks(tiny_vocabulary, 2):
        torch.testing.assert_close(loss, expected)


def untrained(rank, ranks):
    target = torch.arange(6)
    return vocab_parallel_cross_entropy(torch.zeros(6, 8), target, tp_group=dist.group.WORLD, vocab_size=13)


def test_equal_logits_give_the_log_of_the_true_vocabulary():
    for loss in run_on_ranks(untrained, 2):
        torch.testing.assert_close(loss, torch.full((6,), math.log(13)))

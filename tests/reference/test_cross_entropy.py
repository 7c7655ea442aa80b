"""Start here when cross_entropy goes wrong without the compiled library, or in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.reference import cross_entropy as reference
from fused_megatron.reference.cross_entropy import LossTerms


def _inputs(num_rows: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(num_rows, vocab_size, dtype=torch.float64) * 3
    target = torch.randint(0, vocab_size, (num_rows,))
    target[::5] = -100
    return logits, target


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_loss_equals_torch(label_smoothing: float) -> None:
    logits, target = _inputs(13, 37)
    loss = reference.cross_entropy(logits, target, LossTerms(37, label_smoothing=label_smoothing))
    torch.testing.assert_close(
        loss, F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing), rtol=1e-12, atol=1e-12
    )


def test_z_loss_adds_the_square_of_lse() -> None:
    logits, target = _inputs(13, 37)
    added = reference.cross_entropy(logits, target, LossTerms(37, z_loss=0.5))
    added = added - reference.cross_entropy(logits, target, LossTerms(37))
    expected = 0.5 * logits.logsumexp(dim=1).square().masked_fill(target == -100, 0.0)
    torch.testing.assert_close(added, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_gradient_equals_autograd_on_every_shard(label_smoothing: float, z_loss: float) -> None:
    vocab_size, bounds = 37, (0, 20, 30, 45)  # the last shard has 7 real columns and 8 padded ones
    logits, target = _inputs(13, 45)
    target[target >= vocab_size] = 36
    logits.requires_grad_()
    terms = LossTerms(vocab_size, label_smoothing=label_smoothing, z_loss=z_loss)
    shards = [(logits[:, start:end], terms.from_column(start)) for start, end in itertools.pairwise(bounds)]
    stats = torch.stack([reference.cross_entropy_statistics(x, target, of_shard) for x, of_shard in shards])
    united = reference.united_statistics(stats, target, bounds, terms)
    loss, lse = reference.cross_entropy_merge(united.unsqueeze(0), target, 45, terms)
    whole = reference.cross_entropy(logits, target, terms)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-12)
    grad_loss = torch.randn(13, dtype=torch.float64)
    (expected,) = torch.autograd.grad(whole, logits, grad_loss)
    gradients = [reference.cross_entropy_gradient(grad_loss, x, target, lse, of_shard) for x, of_shard in shards]
    torch.testing.assert_close(torch.cat(gradients, dim=1), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("common", [0.0, 1e6])
def test_merging_one_shard_changes_no_bit(common: float) -> None:
    logits, target = torch.randn(13, 37) + common, torch.arange(13)
    terms = LossTerms(37, label_smoothing=0.1)
    stats = reference.cross_entropy_statistics(logits, target, terms)
    assert torch.equal(reference.united_statistics(stats.unsqueeze(0), target, (0, 37), terms), stats)


def test_shard_of_only_padding() -> None:
    stats = reference.cross_entropy_statistics(
        torch.randn(3, 4), torch.tensor([1, -100, 7]), LossTerms(8, 8, label_smoothing=0.1)
    )
    assert stats.tolist() == [[0.0, -torch.inf, 0.0], [0.0, 0.0, 0.0], [0.0, -torch.inf, 0.0]]


def test_invalid_target_gives_nan() -> None:
    stats = reference.cross_entropy_statistics(torch.randn(3, 4), torch.tensor([1, 4, -1]), LossTerms(4))
    assert stats[:, 2].isnan().tolist() == [False, True, True]

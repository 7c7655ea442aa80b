"""Cross-entropy of vocabulary shards in plain PyTorch: statistics of a shard, their merge, the gradient of a shard."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from fused_megatron.checks import InputError
from fused_megatron.reference.precision import widen


@dataclass(frozen=True)
class LossTerms:
    """Parameters of the loss of a token, and the range of vocabulary entries that the logits cover.

        loss = lse - (1 - s) x_target - (s / V) sum_j x_j + z lse^2,   lse = log(sum_j exp(x_j)),   x over V entries

    Args:
        vocab_size: V, the number of vocabulary entries without padding. Columns with a global id of V or more are
            padding: the loss ignores them, and their gradient is 0.
        vocab_start: global id of the first column of the logits.
        ignore_index: tokens with this target have loss 0 and gradient 0.
        label_smoothing: s in [0, 1], spread over all V entries.
        z_loss: z, the weight of lse^2, which keeps the logits from drifting (PaLM, arXiv:2204.02311).
        softcap: c > 0: x is c tanh(logits / c) (Gemma 2, arXiv:2408.00118). None: x is the logits.

    Raises:
        InputError: a number is out of its range.
    """

    vocab_size: int
    vocab_start: int = 0
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        # Messages are built only on failure: for a tiny model, formatting them would dominate these checks.
        if self.vocab_start < 0:
            raise InputError(f"vocab_start={self.vocab_start} must not be negative")
        if self.vocab_size < 1:
            raise InputError(f"vocab_size={self.vocab_size} must be at least 1")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise InputError(f"label_smoothing={self.label_smoothing} must be in [0, 1]")
        if self.softcap is not None and not 0.0 < self.softcap < float("inf"):
            raise InputError(f"softcap={self.softcap} must be above 0 and finite, or None for no cap")

    def scalars(self) -> tuple[int, int, int, float, float, float]:
        """Return the last arguments of every op of the loss, in the order of SCALARS; softcap 0 means no cap."""
        return (
            self.vocab_start,
            self.vocab_size,
            self.ignore_index,
            self.label_smoothing,
            self.z_loss,
            self.softcap or 0.0,
        )

    @classmethod
    def of_scalars(
        cls, vocab_start: int, vocab_size: int, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float
    ) -> "LossTerms":
        """Build the terms from the result of scalars()."""
        return cls(vocab_size, vocab_start, ignore_index, label_smoothing, z_loss, softcap or None)

    def num_real(self, num_columns: int) -> int:
        """Return the number of a shard's columns that are vocabulary entries; the other columns are padding."""
        return max(0, min(num_columns, self.vocab_size - self.vocab_start))

    def from_column(self, column: int) -> "LossTerms":
        """Return the terms for the block of columns that begins at this column of the shard."""
        return replace(self, vocab_start=self.vocab_start + column)


SCALARS = "int vocab_start, int vocab_size, int ignore_index, float label_smoothing, float z_loss, float softcap"
"""Schema of the arguments that LossTerms.scalars() returns."""


def cross_entropy(logits: torch.Tensor, target: torch.Tensor, terms: LossTerms) -> torch.Tensor:
    """Return the loss of each token for unsharded logits [T, V], in fp32 (fp64 for fp64); plain autograd works."""
    stats = cross_entropy_statistics(logits, target, terms)
    return cross_entropy_merge(stats.unsqueeze(0), target, logits.shape[1], terms)[0]


def cross_entropy_statistics(logits: torch.Tensor, target: torch.Tensor, terms: LossTerms) -> torch.Tensor:
    """Compute torch.ops.fused_megatron.cross_entropy_statistics: [T, 3], (shift, log_sum, linear) of each token.

    The shift, here the maximum, is subtracted from every logit: a large offset common to all logits costs no precision.
    """
    x = _capped(widen(logits)[:, : terms.num_real(logits.shape[1])], terms)
    if x.shape[1] == 0:
        shift, linear = x.new_zeros((2, x.shape[0]))
        log_sum = torch.full_like(shift, -torch.inf)
    else:
        maximum = x.detach().amax(dim=1)
        # A row of only -inf is shifted by 0, so that its sum is 0 and not NaN. (+inf gives NaN, as in torch.)
        shift = maximum.masked_fill(maximum == -torch.inf, 0.0)
        x = x - shift.unsqueeze(1)
        log_sum = x.exp().sum(dim=1).log()
        column = target - terms.vocab_start
        owned = (column >= 0) & (column < x.shape[1])
        picked = x.gather(1, column.clamp(0, x.shape[1] - 1).unsqueeze(1)).squeeze(1)
        linear = torch.where(owned, -(1.0 - terms.label_smoothing) * picked, 0.0)
        if terms.label_smoothing:
            linear = linear - terms.label_smoothing / terms.vocab_size * x.sum(dim=1)
    linear = linear.masked_fill(_invalid(target, terms), torch.nan)
    stats = torch.stack((shift, log_sum, linear), dim=1)
    return stats.masked_fill(_ignored(target, terms).unsqueeze(1), 0.0)


def united_statistics(
    stats: torch.Tensor, target: torch.Tensor, bounds: Sequence[int], terms: LossTerms
) -> torch.Tensor:
    """Merge the statistics of neighbouring blocks of columns to the statistics [T, 3] of their union.

    Args:
        stats: [blocks, T, 3].
        target: [T] int64.
        bounds: blocks + 1 columns of the full vocabulary; block i covers columns bounds[i] to bounds[i + 1].
        terms: of the loss; vocab_start has no effect.
    """
    shift, log_sum, linear = stats.unbind(dim=2)
    # Everything is relative to the block with the largest sum: merging a single block changes no bit.
    top = (shift + log_sum).detach().argmax(dim=0, keepdim=True)
    top_shift, top_log_sum = (x.detach().gather(0, top) for x in (shift, log_sum))
    top_log_sum = top_log_sum.masked_fill(top_log_sum == -torch.inf, 0.0)
    exp_sum = ((shift - top_shift) + (log_sum - top_log_sum)).exp().sum(dim=0)
    total = torch.zeros_like(exp_sum)
    for i, (start, end) in enumerate(pairwise(bounds)):
        owned = ((target >= start) & (target < end)).to(linear.dtype)
        num_real = max(0, min(end, terms.vocab_size) - start)
        # If all logits grow by c, the linear term of this block falls by share * c; the shares of all blocks add to 1.
        share = (1.0 - terms.label_smoothing) * owned + terms.label_smoothing * num_real / terms.vocab_size
        total = total + (linear[i] + share * (top_shift[0] - shift[i]))
    return torch.stack((top_shift[0], top_log_sum[0] + exp_sum.log(), total), dim=1)


def cross_entropy_merge(
    stats: torch.Tensor, target: torch.Tensor, num_columns: int, terms: LossTerms
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute torch.ops.fused_megatron.cross_entropy_merge: (loss [T], lse [T, 2]) from stats [R, T, 3]."""
    bounds = [shard * num_columns for shard in range(stats.shape[0] + 1)]
    shift, log_sum, linear = united_statistics(stats, target, bounds, terms).unbind(dim=1)
    loss = log_sum + linear
    if terms.z_loss:
        loss = loss + terms.z_loss * (shift + log_sum).square()
    return loss.masked_fill(_ignored(target, terms), 0.0), torch.stack((shift, log_sum), dim=1)


def cross_entropy_gradient(
    grad_loss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, terms: LossTerms
) -> torch.Tensor:
    """Compute torch.ops.fused_megatron.cross_entropy_gradient: the gradient of the logits, in their dtype."""
    num_real = terms.num_real(logits.shape[1])
    smoothing = terms.label_smoothing
    x = _capped(widen(logits)[:, :num_real], terms)
    shift, log_sum = lse.to(x.dtype).split(1, dim=1)
    scale = 1.0 + 2.0 * terms.z_loss * (shift + log_sum)
    gradient = (x - shift - log_sum).exp() * scale - smoothing / terms.vocab_size
    column = target - terms.vocab_start
    is_target = torch.arange(num_real, device=logits.device) == column.unsqueeze(1)
    gradient = gradient - (1.0 - smoothing) * is_target.to(x.dtype)
    if terms.softcap:
        # 1 - tanh^2 = 1 / cosh^2, which does not cancel for logits near the cap.
        gradient = gradient / (widen(logits)[:, :num_real] / terms.softcap).cosh().square()
    gradient = gradient * grad_loss.to(x.dtype).unsqueeze(1)
    gradient = gradient.masked_fill(_invalid(target, terms).unsqueeze(1), torch.nan)
    gradient = gradient.masked_fill(_ignored(target, terms).unsqueeze(1), 0.0)
    padded = logits.shape[1] - num_real
    return torch.nn.functional.pad(gradient, (0, padded)).to(logits.dtype)


def cross_entropy_gradient_(
    grad_loss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, terms: LossTerms
) -> None:
    """Compute torch.ops.fused_megatron.cross_entropy_gradient_: the gradient overwrites the logits."""
    logits.copy_(cross_entropy_gradient(grad_loss, logits, target, lse, terms))


def _capped(x: torch.Tensor, terms: LossTerms) -> torch.Tensor:
    return terms.softcap * (x / terms.softcap).tanh() if terms.softcap else x


def _ignored(target: torch.Tensor, terms: LossTerms) -> torch.Tensor:
    return target == terms.ignore_index


def _invalid(target: torch.Tensor, terms: LossTerms) -> torch.Tensor:
    return ((target < 0) | (target >= terms.vocab_size)) & (target != terms.ignore_index)

"""Cross-entropy of vocabulary shards in plain PyTorch: statistics of a shard, their merge, the gradient of a shard."""

from typing import Any

import torch


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Loss of each token for whole logits [T, V], in fp32 (fp64 for fp64); differentiable by plain autograd."""
    vocab_size = logits.shape[1] if vocab_size is None else vocab_size
    stats = cross_entropy_statistics(logits, target, 0, vocab_size, ignore_index, label_smoothing, softcap)
    return cross_entropy_merge(stats.unsqueeze(0), target, ignore_index, z_loss)[0]


def cross_entropy_statistics(
    logits: torch.Tensor,
    target: torch.Tensor,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """What torch.ops.fused_megatron.cross_entropy_statistics computes: [T, 2], (lse, linear) of each token."""
    x = _capped(_wide(logits)[:, : _num_real_columns(logits, vocab_start, vocab_size)], softcap)
    ignored, invalid = _ignored(target, ignore_index), _invalid(target, vocab_size, ignore_index)
    if x.shape[1] == 0:
        lse, linear = x.new_full((x.shape[0],), -torch.inf), x.new_zeros(x.shape[0])
    else:
        maximum = x.detach().amax(dim=1, keepdim=True)
        # A row of -inf alone: shifted by 0, so that its sum is 0 and its lse -inf. (+inf gives NaN, as in torch.)
        maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
        lse = maximum.squeeze(1) + (x - maximum).exp().sum(dim=1).log()
        column = target - vocab_start
        owned = (column >= 0) & (column < x.shape[1])
        picked = x.gather(1, column.clamp(0, x.shape[1] - 1).unsqueeze(1)).squeeze(1)
        linear = torch.where(owned, -(1.0 - label_smoothing) * picked, 0.0)
        if label_smoothing:
            linear = linear - label_smoothing / vocab_size * x.sum(dim=1)
    linear = linear.masked_fill(invalid, torch.nan)
    return torch.stack((lse.masked_fill(ignored, 0.0), linear.masked_fill(ignored, 0.0)), dim=1)


def cross_entropy_merge(
    stats: torch.Tensor, target: torch.Tensor, ignore_index: int, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What torch.ops.fused_megatron.cross_entropy_merge computes: (loss [T], lse [T]) from stats [R, T, 2]."""
    lse_shards, linear = stats.unbind(dim=2)
    maximum = lse_shards.detach().amax(dim=0)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    lse = maximum + (lse_shards - maximum).exp().sum(dim=0).log()
    loss = lse + linear.sum(dim=0)
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss.masked_fill(_ignored(target, ignore_index), 0.0), lse


def cross_entropy_gradient(
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """What torch.ops.fused_megatron.cross_entropy_gradient computes: the gradient of the logits, in their dtype."""
    num_real = _num_real_columns(logits, vocab_start, vocab_size)
    x = _capped(_wide(logits)[:, :num_real], softcap)
    lse = lse.to(x.dtype)
    gradient = (x - lse.unsqueeze(1)).exp() * (1.0 + 2.0 * z_loss * lse).unsqueeze(1) - label_smoothing / vocab_size
    column = target - vocab_start
    is_target = torch.arange(num_real, device=logits.device) == column.unsqueeze(1)
    gradient = gradient - (1.0 - label_smoothing) * is_target.to(x.dtype)
    if softcap:
        # 1 - tanh^2, in the form that does not cancel where the cap bites.
        gradient = gradient / (_wide(logits)[:, :num_real] / softcap).cosh().square()
    gradient = gradient * grad_loss.to(x.dtype).unsqueeze(1)
    gradient = gradient.masked_fill(_invalid(target, vocab_size, ignore_index).unsqueeze(1), torch.nan)
    gradient = gradient.masked_fill(_ignored(target, ignore_index).unsqueeze(1), 0.0)
    padded = logits.shape[1] - num_real
    return torch.nn.functional.pad(gradient, (0, padded)).to(logits.dtype)


def cross_entropy_gradient_(grad_loss: torch.Tensor, logits: torch.Tensor, *arguments: Any) -> None:
    """What torch.ops.fused_megatron.cross_entropy_gradient_ computes: the gradient, written over the logits."""
    logits.copy_(cross_entropy_gradient(grad_loss, logits, *arguments))


def _capped(x: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * (x / softcap).tanh() if softcap else x


def _num_real_columns(logits: torch.Tensor, vocab_start: int, vocab_size: int) -> int:
    """How many columns of this shard stand for words; the rest is padding."""
    return max(0, min(logits.shape[1], vocab_size - vocab_start))


def _ignored(target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    return target == ignore_index


def _invalid(target: torch.Tensor, vocab_size: int, ignore_index: int) -> torch.Tensor:
    return ((target < 0) | (target >= vocab_size)) & (target != ignore_index)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()

"""Cross-entropy of logits sharded over the vocabulary."""

import torch

from fused_megatron.checks import check, check_shape
from fused_megatron.collectives import Group, group_rank, group_size
from fused_megatron.collectives.transfers import start_all_gather, start_all_reduce_, start_reduce_scatter
from fused_megatron.ops import LossTerms
from fused_megatron.ops.cross_entropy_shards import (
    Exchange,
    Pending,
    ShardLoss,
    check_shard,
    check_targets,
    has_own_rows,
    with_dense_rows,
)


class ShardExchange(Exchange):
    """Exchanges between R shards of the vocabulary: statistics; for a head also hidden and its gradient, by chunks."""

    def __init__(self, group: Group, sequence_parallel: bool = False) -> None:
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.num_shards = group_size(group)
        self.num_blocks = self.num_shards if sequence_parallel else 1

    def start_hidden(self, rows: torch.Tensor) -> Pending:
        return start_all_gather(rows, 0, self.group).wait if self.sequence_parallel else lambda: rows

    def start_statistics(self, stats: torch.Tensor) -> Pending:
        return start_all_gather(stats.unsqueeze(0), 0, self.group).wait

    def start_dhidden(self, partial: torch.Tensor) -> Pending:
        if self.sequence_parallel:
            return start_reduce_scatter(partial, 0, self.group).wait
        return start_all_reduce_(partial, self.group).wait


def vocab_parallel_cross_entropy(
    logits_shard: torch.Tensor,
    target: torch.Tensor,
    *,
    tp_group: Group,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    padded_vocab_size: int | None = None,
    inplace_backward: bool = False,
    check_target: bool | None = None,
) -> torch.Tensor:
    """Cross-entropy of each token from logits sharded over the vocabulary.

    Equals torch.nn.functional.cross_entropy(logits, target, reduction="none", ...) in float32, for the logits of all
    ranks without padding. With x the logits of a token over the V entries of the vocabulary:

        loss = lse - (1 - s) x_target - (s / V) sum_j x_j + z lse^2,   lse = log(sum_j exp(x_j))

        logits_shard [T, Vp / R]  columns from rank * Vp / R; Vp >= V with padding
        forward      (shift_r, log_sum_r, linear_r) of this rank's columns, all-gathered to [R, T, 3] and merged
        backward     dlogits_shard [T, Vp / R], from the merged lse; 0 for padding

    Args:
        logits_shard: [..., Vp / R] float32, bfloat16, float16 or float64; this rank's columns, not the gathered logits.
        target: [...] int64; token ids of the whole vocabulary, the same on every rank.
        tp_group: the R ranks; None for this rank only.
        vocab_size: V, the size of the vocabulary without padding; columns from V on are ignored.
        ignore_index: tokens with this target have loss 0 and gradient 0.
        label_smoothing: s, spread over all V entries.
        z_loss: z, the weight of lse^2 (PaLM, arXiv:2204.02311).
        softcap: c > 0: x is c tanh(logits / c) (Gemma 2, arXiv:2408.00118). None: x is the logits.
        padded_vocab_size: Vp; if given, logits of another width raise, for any amount of padding.
        inplace_backward: the backward overwrites logits_shard with its gradient, and so needs no memory for it.
            Autograd then refuses any other use of these logits in a backward, also a second backward. No effect under
            torch.compile, which reuses memory by itself.
        check_target: True: always check that targets are in the vocabulary (synchronises on a GPU). None: check only
            where that needs no synchronisation (CPU, outside torch.compile). False: never check.

    Returns:
        [...] float32 (float64 for float64 logits), bitwise the same on every rank.

    Raises:
        InputError: shapes that do not fit, gathered logits, this rank not in tp_group, or a target outside the
            vocabulary (see check_target; unchecked, the loss of such a token is NaN).
        TypeError: wrong dtypes.

    Communication: forward one all-gather of 12 bytes for each token and rank; none backward.
    Memory: logits_shard (no copy), target and lse are saved.
    Numerics: float32 inside; the gradient is rounded once, to the dtype of the logits; deterministic.
    """
    ranks = group_size(tp_group)
    check(logits_shard.dim() >= 1, "logits_shard.shape=() must have a last dim of vocabulary")
    columns = logits_shard.shape[-1]
    check_shape("target", target, logits_shard.shape[:-1])
    check_shard_size(
        "logits_shard.shape[-1]", columns, ranks, vocab_size, padded_vocab_size, "columns, not the gathered logits"
    )
    terms = LossTerms(
        vocab_size,
        vocab_start=group_rank(tp_group) * columns,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )
    rows, ids = with_dense_rows(logits_shard.reshape(-1, columns)), target.reshape(-1).contiguous()
    if inplace_backward and not has_own_rows(rows):
        rows = rows.contiguous()
    check_shard(rows, ids)
    check_targets(ids, terms, check_target)
    exchange = ShardExchange(tp_group) if ranks > 1 else None
    return ShardLoss.apply(rows, ids, terms, exchange, inplace_backward).view(target.shape)


def check_shard_size(
    name: str, size: int, ranks: int, vocab_size: int, padded_vocab_size: int | None, wanted: str
) -> None:
    """Raise unless `size` is the size of one of R shards of the vocabulary.

    The whole vocabulary in place of a shard would give a plausible loss, log(R) too high, and wrong gradients.
    """
    found = f"{name}={size} x tensor_parallel_size={ranks}"
    check(1 <= vocab_size <= size * ranks, f"{found} must be at least vocab_size={vocab_size}")
    if padded_vocab_size is None:
        check(
            ranks == 1 or size < vocab_size,
            f"{name}={size} must be below vocab_size={vocab_size}, being one of tensor_parallel_size={ranks} shards "
            f"(pass this rank's {wanted}; or, where padding is most of a tiny vocabulary, padded_vocab_size)",
        )
    else:
        check(
            size * ranks == padded_vocab_size,
            f"{found} must equal padded_vocab_size={padded_vocab_size} (pass this rank's {wanted})",
        )

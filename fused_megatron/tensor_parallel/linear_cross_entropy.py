"""Linear head sharded over the vocabulary, and its cross-entropy, in one op that keeps a tile of the logits only."""

import torch

from fused_megatron.checks import check, check_one_of, check_shape
from fused_megatron.collectives import Group, group_rank, group_size
from fused_megatron.ops import LossTerms
from fused_megatron.ops.cross_entropy_shards import check_targets
from fused_megatron.ops.linear_cross_entropy import check_head, loss_of_tiles, operand_and_result_dtype
from fused_megatron.sharding import parameter_record
from fused_megatron.tensor_parallel.cross_entropy import ShardExchange, check_shard_size


def vocab_parallel_linear_cross_entropy(
    hidden: torch.Tensor,
    weight_shard: torch.Tensor,
    target: torch.Tensor,
    *,
    tp_group: Group,
    vocab_size: int,
    bias_shard: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    padded_vocab_size: int | None = None,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    reduction: str = "none",
) -> torch.Tensor:
    """Cross-entropy of each token of a linear head sharded over the vocabulary, in chunks of tokens.

    Equals vocab_parallel_cross_entropy(column_parallel_linear(hidden, weight_shard, bias_shard), target), without the
    logits [T, Vp / R]. For each chunk of t tokens:

        x          [t, H]       replicated; under sequence parallelism all_gather of a slice of hidden [S / R, B, H]
        w_shard_o  [Vp / R, H]  rows from rank * Vp / R; Vp >= V with padding
        forward    logits_shard [t, Vp / R] = x @ w_shard_o.T + b_shard_o
                   (shift_r, log_sum_r, linear_r) of logits_shard, all-gathered to [R, t, 3] and merged to the loss
        backward   logits_shard is computed again, and overwritten by dlogits_shard from the merged lse
                   dx = all_reduce(dlogits_shard @ w_shard_o); under sequence parallelism reduce_scatter to this rank's
                   slice;  dw_shard_o += dlogits_shard.T @ x;  db_shard_o += sum over the tokens of dlogits_shard

    With reduction "sum" (for training; the caller divides the sum) all tokens have the same upstream gradient. So
    forward computes dlogits_shard and its products while it has the logits: 3 products instead of 4.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64, the same on every rank; under sequence parallelism this
            rank's block [S / R, ..., H].
        weight_shard: [Vp / R, H]; may have another dtype, as in ops.linear_cross_entropy.
        target: [...] or [S, ...] int64 for the whole sequence; token ids of the whole vocabulary, the same on every
            rank.
        tp_group: the R ranks; None for this rank only.
        vocab_size: V, the size of the vocabulary without padding; rows of the full weight from V on are padding.
        bias_shard: [Vp / R] or None.
        ignore_index, label_smoothing, z_loss, softcap: as in ops.linear_cross_entropy.
        padded_vocab_size: Vp; if given, a shard of another size raises, for any amount of padding.
        sequence_parallel: hidden and its gradient are sequence shards in dim 0.
        chunk_tokens: tokens of a tile of logits, over all ranks; None: chosen by the bytes of a tile.
        reduction: "none" or "sum".

    Returns:
        The shape of target, float32 (float64 for float64), bitwise the same on every rank. With "sum" a scalar, always
        float64, so that sums over microbatches and ranks lose no precision.

    Raises:
        InputError: shapes that do not fit, a full weight, this rank not in tp_group, or, on the CPU, a target outside
            the vocabulary (on a GPU the loss of such a token is NaN).
        TypeError: wrong dtypes.

    Communication: for each of the C chunks (C = 1 if all logits fit in one tile)
        forward   one all-gather of 12 bytes for each token and rank, under the product of the next chunk
        backward  one all-reduce of dx, under the product for dw; none if hidden needs no gradient
        Under sequence parallelism also one all-gather of a slice of hidden forward and backward, under the products of
        the chunk before, and a reduce-scatter instead of the all-reduce. With "sum" all of this happens in forward,
        with one all-gather of hidden, and nothing in backward.
    Memory: hidden (under sequence parallelism the shard), weight_shard, target and lse are saved; one tile of logits
        exists at a time. With "sum" there are two tiles of half the size, and the float32 gradients are kept until
        backward, which adds the gradient of weight_shard to its main_grad if it has one. (16-bit operands on a CPU
        without matrix units: as for "none".)
    Numerics: as ops.linear_cross_entropy with the same reduction; dx is reduced in the dtype of the operands.
    """
    check_one_of("reduction", reduction, ("none", "sum"))
    ranks, num_rows = group_size(tp_group), weight_shard.shape[0]
    sequence_parallel = sequence_parallel and ranks > 1
    own_target = target
    if sequence_parallel:
        check(hidden.dim() >= 2, f"hidden.shape={tuple(hidden.shape)} must be (S / R, ..., hidden_size)")
        check_shape("target", target, (ranks * hidden.shape[0], *hidden.shape[1:-1]))
        own_target = target[: hidden.shape[0]]
    check_head(hidden, weight_shard, bias_shard, own_target, chunk_tokens, "weight_shard")
    check_shard_size(
        "weight_shard.shape[0]", num_rows, ranks, vocab_size, padded_vocab_size, "rows, not the whole weight"
    )
    terms = LossTerms(
        vocab_size,
        vocab_start=group_rank(tp_group) * num_rows,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )
    ids = target.reshape(-1).contiguous()
    check_targets(ids, terms)
    # Cast before the gather, so that fewer bytes move.
    rows = hidden.to(operand_and_result_dtype(hidden, weight_shard)[0]).reshape(-1, weight_shard.shape[1])
    loss = loss_of_tiles(
        rows.contiguous(),
        weight_shard,
        bias_shard,
        ids,
        terms,
        chunk_tokens,
        sum_dtype=torch.float64 if reduction == "sum" else None,
        exchange=ShardExchange(tp_group, sequence_parallel) if ranks > 1 else None,
        dweight_sum=parameter_record(weight_shard).main_grad,
    )
    return loss.view(target.shape) if reduction == "none" else loss

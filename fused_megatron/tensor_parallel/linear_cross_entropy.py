"""A linear head sharded over the vocabulary and its cross-entropy in one op: no rank ever holds its logits whole."""

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
    """Cross-entropy of each token of a linear head sharded over the vocabulary, a chunk of tokens at a time.

    Equals vocab_parallel_cross_entropy(column_parallel_linear(hidden, weight_shard, bias_shard), target), without the
    logits [T, Vp / R]. For a chunk of t tokens, each chunk after the other:

        x          [t, H]       replicated; under sequence parallelism all_gather of a slice of hidden [S / R, B, H]
        w_shard_o  [Vp / R, H]  rows rank * Vp / R and on; Vp >= V with padding
        forward    logits_shard [t, Vp / R] = x @ w_shard_o.T + b_shard_o
                   (shift_r, log_sum_r, linear_r) of it, all-gathered to [R, t, 3] and merged to the loss
        backward   logits_shard once more, and dlogits_shard in its place, from the merged lse
                   dx = all_reduce(dlogits_shard @ w_shard_o); under sequence parallelism reduce_scatter to this rank's
                   slice;  dw_shard_o += dlogits_shard.T @ x;  db_shard_o += sum over the tokens of dlogits_shard

    The sum of all tokens (reduction "sum", then divided by the caller: what training wants) has one upstream gradient
    for all, so dlogits_shard and its products are made forward, while the logits are there: 3 products in place of 4.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64, the same on every rank; under sequence parallelism this
            rank's block [S / R, ..., H].
        weight_shard: [Vp / R, H]; may be of another dtype: as in ops.linear_cross_entropy.
        target: [...] or [S, ...] int64; of the whole sequence, ids in the whole vocabulary, the same on every rank.
        tp_group: the R ranks; None for this rank only.
        vocab_size: V, the true size of the vocabulary; rows of the whole weight from V on are padding.
        bias_shard: [Vp / R] or None.
        ignore_index, label_smoothing, z_loss, softcap: as in ops.linear_cross_entropy.
        padded_vocab_size: Vp; where it is given, a shard of another size is refused, however much is padding.
        sequence_parallel: hidden is a sequence shard, dim 0; so is its gradient.
        chunk_tokens: tokens of a tile of logits, of all ranks together; None: by its bytes.
        reduction: "none" or "sum".

    Returns:
        The shape of target, float32 (float64 for float64), bitwise the same on every rank. With "sum" a scalar, always
        float64, so that the sums of microbatches and ranks lose nothing.

    Raises:
        InputError: shapes that do not fit, a weight that is whole, this rank not in tp_group or, on the CPU, a target
            that is no word. On a GPU the loss of such a token is NaN.
        TypeError: wrong dtypes.

    Communication: for each of the C chunks (C = 1 where all logits fit one tile)
        forward   one all-gather of 12 bytes a token and rank, under the product of the next chunk
        backward  one all-reduce of dx, under the product for dw
        under sequence parallelism also one all-gather of a slice of hidden forward and backward, under the products of
        the chunk before, and a reduce-scatter in place of the all-reduce. None backward for hidden without a gradient.
        With "sum" all of it forward, hidden gathered once, and nothing backward.
    Memory: hidden as given, weight_shard, target and lse are saved; one tile of logits exists at a time. With "sum"
        two half as large, and the gradients, float32, are held until backward, which adds that of weight_shard to its
        main_grad where it has one. (16-bit operands on a CPU without matrix units: as for "none".)
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
    # Cast before anything is gathered, so that less moves.
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

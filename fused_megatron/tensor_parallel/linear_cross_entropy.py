"""A linear head sharded over the vocabulary and its cross-entropy in one op: no rank ever holds its logits whole."""

from typing import Any

import torch

from fused_megatron.checks import check, check_one_of, check_shape
from fused_megatron.collectives import Group, group_rank, group_size
from fused_megatron.collectives.transfers import start_all_gather, start_all_reduce_, start_reduce_scatter
from fused_megatron.ops.cross_entropy_shards import check_targets
from fused_megatron.ops.linear_cross_entropy import (
    check_head,
    operand_and_result_dtype,
    refuse_second_derivative,
    scaled_,
)
from fused_megatron.ops.linear_cross_entropy_tiles import Exchange, LossTerms, Pending, TiledHead, fits_one_pass
from fused_megatron.sharding import parameter_record


class _ShardExchange(Exchange):
    """What R shards of the vocabulary exchange, chunk by chunk."""

    def __init__(self, group: Group, sequence_parallel: bool, dtype: torch.dtype) -> None:
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.dtype = dtype
        self.num_shards = group_size(group)
        self.num_blocks = self.num_shards if sequence_parallel else 1

    def start_hidden(self, rows: torch.Tensor) -> Pending:
        return start_all_gather(rows, 0, self.group).wait if self.sequence_parallel else lambda: rows

    def start_statistics(self, stats: torch.Tensor) -> Pending:
        return start_all_gather(stats.unsqueeze(0), 0, self.group).wait

    def start_dhidden(self, partial: torch.Tensor) -> Pending:
        if self.num_shards == 1:
            return lambda: partial
        partial = partial.to(self.dtype)  # half the bytes for 16-bit activations, as in column_parallel_linear
        if self.sequence_parallel:
            return start_reduce_scatter(partial, 0, self.group).wait
        return start_all_reduce_(partial, self.group).wait


class _LossOfEachToken(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight_shard: torch.Tensor, bias_shard: torch.Tensor | None,
        target: torch.Tensor, terms: LossTerms, chunk_tokens: int | None, group: Group, sequence_parallel: bool,
    ) -> torch.Tensor:  # fmt: skip
        ctx.arguments = terms, chunk_tokens, _ShardExchange(group, sequence_parallel, hidden.dtype)
        loss, lse = TiledHead(hidden, weight_shard, bias_shard, target, *ctx.arguments).losses()
        ctx.save_for_backward(hidden, weight_shard, bias_shard, target, lse)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> Any:
        refuse_second_derivative()
        *inputs, lse = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        gradients = TiledHead(*inputs, *ctx.arguments).gradients(grad_loss.to(lse.dtype), lse, needs)
        return *gradients, None, None, None, None, None


class _SumOfTokens(torch.autograd.Function):
    """The gradients are made with the sum, for an upstream gradient of 1, and scaled backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight_shard: torch.Tensor, bias_shard: torch.Tensor | None,
        target: torch.Tensor, terms: LossTerms, chunk_tokens: int | None, group: Group, sequence_parallel: bool,
    ) -> torch.Tensor:  # fmt: skip
        exchange = _ShardExchange(group, sequence_parallel, hidden.dtype)
        ctx.arguments = terms, chunk_tokens, exchange
        head = TiledHead(
            hidden, weight_shard, bias_shard, target, terms, chunk_tokens, exchange, one_pass=True
        )  # fmt: skip
        one = hidden.new_ones((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        loss, lse, ctx.gradients = head.losses_and_gradients(one, list(ctx.needs_input_grad[:3]))
        ctx.save_for_backward(hidden, weight_shard, bias_shard, target, lse)
        ctx.main_grad = parameter_record(weight_shard).main_grad
        return loss.sum(dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative()
        *inputs, lse = ctx.saved_tensors
        needs, scale = list(ctx.needs_input_grad[:3]), grad.to(lse.dtype)
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # once more, with retain_graph=True
            gradients = TiledHead(*inputs, *ctx.arguments).gradients(scale.expand(len(lse)), lse, needs)
            scale = torch.ones_like(scale)
        if needs[1] and ctx.main_grad is not None:
            _add_scaled_(ctx.main_grad, gradients[1], scale)
            gradients[1] = None
        pairs = zip(gradients, inputs, strict=False)
        return *(g if g is None else scaled_(g, scale).to(x.dtype) for g, x in pairs), *[None] * 5


def _add_scaled_(total: torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor) -> None:
    """total += scale gradient, in one pass; nothing waits for a GPU."""
    if scale.is_cpu:
        total.add_(gradient, alpha=scale.item())
    else:
        total.addcmul_(gradient, scale)


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
                   [lse_r, linear_r] of it, all-gathered to [R, t, 2] and merged to the loss on every rank alike
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
        tp_group: the R ranks; None for this one alone.
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
        forward   one all-gather of 8 bytes a token and rank, under the product of the next chunk
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
    ranks = group_size(tp_group)
    sequence_parallel = sequence_parallel and ranks > 1
    own_target = target
    if sequence_parallel:
        check(hidden.dim() >= 2, f"hidden.shape={tuple(hidden.shape)} must be (S / R, ..., hidden_size)")
        check_shape("target", target, (ranks * hidden.shape[0], *hidden.shape[1:-1]))
        own_target = target[: hidden.shape[0]]
    check_head(
        hidden, weight_shard, bias_shard, own_target, label_smoothing, softcap, chunk_tokens, "weight_shard"
    )  # fmt: skip
    _check_shard(weight_shard, ranks, vocab_size, padded_vocab_size)
    ids = target.reshape(-1).contiguous()
    check_targets(ids, vocab_size, ignore_index)
    vocab_start = group_rank(tp_group) * weight_shard.shape[0]
    terms = LossTerms(vocab_size, ignore_index, label_smoothing, z_loss, softcap, vocab_start)
    # Cast before anything is gathered, so that less moves.
    rows = hidden.to(operand_and_result_dtype(hidden, weight_shard)[0]).reshape(-1, weight_shard.shape[1])
    leaves = (rows.contiguous(), weight_shard, bias_shard)
    # Alike on every rank: shapes and dtypes are, and so is what learns.
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    rest = (ids, terms, chunk_tokens, tp_group, sequence_parallel)
    if reduction == "sum" and learns and fits_one_pass(rows, weight_shard.shape[0], chunk_tokens):
        return _SumOfTokens.apply(*leaves, *rest)
    loss = _LossOfEachToken.apply(*leaves, *rest)
    return loss.view(target.shape) if reduction == "none" else loss.sum(dtype=torch.float64)


def _check_shard(weight_shard: torch.Tensor, ranks: int, vocab_size: int, padded_vocab_size: int | None) -> None:
    """A whole weight would give a loss that looks right and is log(R) too high, with wrong gradients."""
    rows = weight_shard.shape[0]
    found = f"weight_shard.shape[0]={rows} x tensor_parallel_size={ranks}"
    check(1 <= vocab_size <= rows * ranks, f"{found} must be at least vocab_size={vocab_size}")
    if padded_vocab_size is None:
        check(
            ranks == 1 or rows < vocab_size,
            f"weight_shard.shape[0]={rows} must be below vocab_size={vocab_size}, being one of "
            f"tensor_parallel_size={ranks} shards (pass this rank's rows, not the whole weight; "
            "or, where padding is most of a tiny vocabulary, padded_vocab_size)",
        )
    else:
        check(
            rows * ranks == padded_vocab_size,
            f"{found} must equal padded_vocab_size={padded_vocab_size} (pass this rank's rows, not the whole weight)",
        )

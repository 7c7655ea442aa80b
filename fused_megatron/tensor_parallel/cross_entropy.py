"""Cross-entropy of logits sharded over the vocabulary."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron import ops
from fused_megatron.checks import check, check_shape
from fused_megatron.collectives import Group, group_rank, group_size
from fused_megatron.collectives.transfers import start_all_gather
from fused_megatron.ops.cross_entropy_shards import has_own_rows


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_shard: torch.Tensor,
        target: torch.Tensor,
        vocab_size: int,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float | None,
        inplace_backward: bool,
        check_target: bool | None,
        group: Group,
    ) -> torch.Tensor:
        vocab_start = group_rank(group) * logits_shard.shape[1]
        shard: dict[str, Any] = {"vocab_start": vocab_start, "vocab_size": vocab_size, "ignore_index": ignore_index}
        shard |= {"label_smoothing": label_smoothing, "softcap": softcap}
        stats = ops.cross_entropy_statistics(logits_shard, target, **shard, check_target=check_target)
        all_stats = start_all_gather(stats.unsqueeze(0), 0, group).wait()
        loss, lse = ops.cross_entropy_merge(all_stats, target, ignore_index=ignore_index, z_loss=z_loss)
        ctx.save_for_backward(logits_shard, target, lse)
        ctx.arguments = {**shard, "z_loss": z_loss}
        ctx.inplace = inplace_backward
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> Any:
        logits_shard, target, lse = ctx.saved_tensors
        # The compiler plans memory by itself, and overwrites the logits where nothing needs them any more.
        in_place = ctx.inplace and not torch.compiler.is_compiling()
        gradient = ops.cross_entropy_gradient_ if in_place else ops.cross_entropy_gradient
        return gradient(grad_loss, logits_shard.detach(), target, lse, **ctx.arguments), *[None] * 9


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

    Equals torch.nn.functional.cross_entropy(logits, target, reduction="none", ...) in float32, of the logits of all
    ranks without padding. With x the logits of a token over the true vocabulary of V words:

        loss = lse - (1 - s) x_target - (s / V) sum_j x_j + z lse^2,   lse = log(sum_j exp(x_j))

        logits_shard [T, Vp / R]  columns rank * Vp / R and on; Vp >= V with padding
        forward      [lse_r, linear_r] of this rank's columns, all-gathered to [R, T, 2], merged on every rank alike
        backward     dlogits_shard [T, Vp / R], from the merged lse alone; 0 for padding

    Args:
        logits_shard: [..., Vp / R] float32, bfloat16, float16 or float64; this rank's columns, not the gathered logits.
        target: [...] int64; ids in the whole vocabulary, the same on every rank.
        tp_group: the R ranks; None for this one alone.
        vocab_size: V, the true size of the vocabulary; columns from V on are left out of everything.
        ignore_index: tokens with this target have loss 0 and gradient 0.
        label_smoothing: s, spread over all V words.
        z_loss: z, the weight of lse^2 (PaLM, arXiv:2204.02311).
        softcap: c > 0: x is c tanh(logits / c) (Gemma 2, arXiv:2408.00118). None: the logits themselves.
        padded_vocab_size: Vp; where it is given, logits of another width are refused, however much is padding.
        inplace_backward: the backward overwrites logits_shard with its gradient, and so needs no memory for it.
            Autograd then refuses everything else that needs these logits, a second backward too. Without effect under
            torch.compile, which reuses memory by itself.
        check_target: True raises for a target that is no word, wherever the tensors are: on a GPU that waits for it.
            None does so where it costs no wait, on the CPU outside torch.compile. False never does.

    Returns:
        [...] float32 (float64 for float64 logits), bitwise the same on every rank.

    Raises:
        InputError: shapes that do not fit, gathered logits, this rank not in tp_group, or a target that is no word
            (check_target). Where nobody looks, the loss of such a token is NaN.
        TypeError: wrong dtypes.

    Communication: one all-gather of 8 bytes a token and rank forward; none backward.
    Memory: logits_shard (no copy), target and lse are saved.
    Numerics: float32 inside; the gradient is rounded once, to the dtype of the logits; deterministic.
    """
    ranks = group_size(tp_group)
    check(logits_shard.dim() >= 1, "logits_shard.shape=() must have a last dim of vocabulary")
    columns = logits_shard.shape[-1]
    check_shape("target", target, logits_shard.shape[:-1])
    check(
        columns * ranks >= vocab_size,
        f"logits_shard.shape[-1]={columns} x tensor_parallel_size={ranks} must be at least vocab_size={vocab_size}",
    )
    # Gathered logits would give a loss that looks right and is log(R) too high, with wrong gradients.
    if padded_vocab_size is None:
        check(
            ranks == 1 or columns < vocab_size,
            f"logits_shard.shape[-1]={columns} must be below vocab_size={vocab_size}, being one of "
            f"tensor_parallel_size={ranks} shards (pass this rank's columns, not the gathered logits; "
            "or, where padding is most of a tiny vocabulary, padded_vocab_size)",
        )
    else:
        check(
            columns * ranks == padded_vocab_size,
            f"logits_shard.shape[-1]={columns} x tensor_parallel_size={ranks} must equal "
            f"padded_vocab_size={padded_vocab_size} (pass this rank's columns, not the gathered logits)",
        )
    rows = logits_shard.reshape(-1, columns)
    if inplace_backward and not has_own_rows(rows):
        rows = rows.contiguous()
    terms = (vocab_size, ignore_index, label_smoothing, z_loss, softcap)
    loss = _VocabParallelCrossEntropy.apply(
        rows, target.reshape(-1), *terms, inplace_backward, check_target, tp_group
    )  # fmt: skip
    return loss.view(target.shape)

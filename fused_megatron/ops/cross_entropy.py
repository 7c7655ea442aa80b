"""Cross-entropy, fused, on one device. The pieces for shards of the vocabulary are in ops/cross_entropy_shards.py."""

import torch

from fused_megatron.checks import InputError, check_shape
from fused_megatron.ops.cross_entropy_shards import (
    ShardLoss,
    check_shard,
    check_targets,
    has_own_rows,
    with_dense_rows,
)
from fused_megatron.reference import cross_entropy as reference
from fused_megatron.reference.cross_entropy import LossTerms

_REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    *,
    softcap: float | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    check_target: bool | None = None,
    weight: None = None,
) -> torch.Tensor:
    """Cross-entropy of logits against class ids, on one device: torch.nn.functional.cross_entropy, fused.

    loss = lse - (1 - s) x_target - (s / V) sum_j x_j + z lse^2,  lse = log(sum_j exp(x_j)),  x = logits[:V]

    Args:
        logits: [Vp], [T, Vp] or [N, Vp, d1, ...] float32, bfloat16, float16 or float64. [T, Vp] with dense rows is read
            where it lies; the other layouts are brought there by a copy.
        target: [], [T] or [N, d1, ...] int64; class ids. (Class probabilities are not supported.)
        ignore_index: tokens with this target have loss 0 and gradient 0, and do not count in the mean.
        reduction: "mean" over the tokens that are not ignored (NaN if all are, as in torch), "sum" or "none".
        label_smoothing: s in [0, 1].
        z_loss: z, the weight of lse^2 (PaLM, arXiv:2204.02311); 0 as in torch.
        softcap: c > 0: x is c tanh(logits / c) (Gemma 2, arXiv:2408.00118). None: the logits themselves.
        vocab_size: V <= Vp, the true number of classes; columns from V on are padding, left out of everything, with
            gradient 0. None: all columns are classes.
        inplace_backward: the backward overwrites the logits with their gradient, and so needs no memory for it.
            Autograd then refuses everything else that needs these logits, a second backward too. Without effect on
            float64 logits and under torch.compile, which reuses memory by itself.
        check_target: True raises for a target that is no class, wherever the tensors are: on a GPU that waits for it.
            None does so where it costs no wait, on the CPU outside torch.compile. False never does.
        weight: None; class weights, an argument of torch's function, are not supported.

    Returns:
        A scalar, or the shape of target for "none"; in the dtype of the logits, as torch (float32 under autocast).

    Raises:
        InputError: wrong shapes or arguments, or a target that is no class (check_target). Where nobody looks, the loss
            and the gradient of such a token are NaN, and nothing is read out of bounds.
        TypeError: wrong dtypes.
        RuntimeError: by autograd, for a backward that needs logits overwritten by inplace_backward.

    Communication: none.
    Memory: saves the logits (no copy), lse and target; forward reads each logit once, backward reads each logit and
        writes each gradient once.
    Numerics: float32 inside and one rounding, of the loss after the reduction and of each gradient; deterministic.
        float64 logits go through plain PyTorch, and can be differentiated twice; the others raise RuntimeError.
    """
    if reduction not in _REDUCTIONS:
        raise InputError(f"reduction={reduction!r} must be one of: {', '.join(_REDUCTIONS)}")
    if weight is not None or isinstance(ignore_index, torch.Tensor):  # weight is torch's third argument
        raise InputError("weight must be None: class weights are not supported (scale the losses of reduction='none')")
    rows, flat_target = _as_rows(logits, target)
    columns = rows.shape[1]
    check_shard(rows, flat_target)
    terms = LossTerms(
        columns if vocab_size is None else vocab_size,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )
    if terms.vocab_size > columns:
        raise InputError(f"vocab_size={vocab_size} must be at most the number of columns, {columns}")
    check_targets(flat_target, terms, check_target)
    if rows.dtype == torch.float64:
        loss = reference.cross_entropy(rows, flat_target, terms)
    else:
        rows = with_dense_rows(rows)
        if inplace_backward and not has_own_rows(rows):
            rows = rows.contiguous()
        loss = ShardLoss.apply(rows, flat_target, terms, None, inplace_backward)
    if reduction == "none":
        loss = loss if target.dim() == 1 else loss.reshape(target.shape)
    else:
        loss = loss.sum()
        if reduction == "mean":
            loss = loss / (flat_target != ignore_index).sum()
    # torch's own op runs in float32 under autocast; ours always does inside, so that only the result differs.
    return loss if torch.is_autocast_enabled(logits.device.type) else loss.to(logits.dtype)


def _as_rows(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [T, V], target [T]) of any layout that torch.nn.functional.cross_entropy takes."""
    if logits.dim() == 0:
        raise InputError("logits.shape=() must have a dimension of classes")
    if logits.dim() == 1:
        check_shape("target", target, ())
        return logits.unsqueeze(0), target.reshape(1)
    if logits.dim() == 2:  # of which the target's shape is checked with the rest
        return logits, target.contiguous()
    check_shape("target", target, (logits.shape[0], *logits.shape[2:]))
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    return rows, target.reshape(-1).contiguous()

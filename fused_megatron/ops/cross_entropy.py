"""Fused cross-entropy on one device. ops/cross_entropy_shards.py has the parts for shards of the vocabulary."""

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
            in place; other layouts are copied to it.
        target: [], [T] or [N, d1, ...] int64; class ids. (Class probabilities are not supported.)
        ignore_index: tokens with this target have loss 0 and gradient 0, and do not count in the mean.
        reduction: "mean" over the tokens that are not ignored (NaN if all are, as in torch), "sum" or "none".
        label_smoothing: s in [0, 1].
        z_loss: z, the weight of lse^2 (PaLM, arXiv:2204.02311); 0 as in torch.
        softcap: c > 0: x is c tanh(logits / c) (Gemma 2, arXiv:2408.00118). None: x is the logits.
        vocab_size: V <= Vp, the number of classes without padding; the loss ignores columns from V on, and their
            gradient is 0. None: all columns are classes.
        inplace_backward: backward overwrites the logits with their gradient, so that the gradient needs no memory.
            Autograd then refuses any other use of these logits, a second backward too. No effect on float64 logits and
            under torch.compile, which reuses memory by itself.
        check_target: True: always check that targets are valid (synchronises on a GPU). None: check only on the CPU and
            outside torch.compile, where no synchronisation is needed. False: never check.
        weight: must be None; class weights, an argument of torch's function, are not supported.

    Returns:
        A scalar, or the shape of target for "none"; in the dtype of the logits, as in torch (float32 under autocast).

    Raises:
        InputError: wrong shapes or arguments, or a target that is not a class (see check_target). If it is not checked,
            the loss and the gradient of such a token are NaN, and nothing is read out of bounds.
        TypeError: wrong dtypes.
        RuntimeError: raised by autograd if a backward needs logits that inplace_backward has overwritten.

    Communication: none.
    Memory: saves the logits (no copy), lse and target; forward reads each logit once, backward reads each logit and
        writes each gradient once.
    Numerics: float32 inside; the loss is rounded once after the reduction, each gradient once; deterministic. float64
        logits run in plain PyTorch and can be differentiated twice; for other dtypes that raises RuntimeError.
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
    # Under autocast torch's op returns float32. This op computes in float32 anyway: only the result's dtype changes.
    return loss if torch.is_autocast_enabled(logits.device.type) else loss.to(logits.dtype)


def _as_rows(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [T, V] and target [T] for any layout that torch.nn.functional.cross_entropy takes."""
    if logits.dim() == 0:
        raise InputError("logits.shape=() must have a dimension of classes")
    if logits.dim() == 1:
        check_shape("target", target, ())
        return logits.unsqueeze(0), target.reshape(1)
    if logits.dim() == 2:  # check_shard checks the target's shape
        return logits, target.contiguous()
    check_shape("target", target, (logits.shape[0], *logits.shape[2:]))
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    return rows, target.reshape(-1).contiguous()

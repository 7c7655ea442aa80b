"""Cross-entropy, fused: whole on one device, and in the three pieces that vocabulary shards need.

A shard of the vocabulary gives two numbers for each token, (lse, linear); those of all shards merge to the loss; and
the gradient of a shard needs the merged lse alone. So a loss over R shards takes one exchange of 8 bytes per token and
shard, and label smoothing, z-loss and ignored tokens come out exactly as on one device.
"""

from typing import Any

import torch

from fused_megatron.checks import InputError, check, check_dtype, check_same_device, check_shape
from fused_megatron.ops.registration import define_op, register_triton
from fused_megatron.reference import cross_entropy as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REDUCTIONS = ("mean", "sum", "none")


def _statistics_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _contiguous_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_statistics = define_op(
    "cross_entropy_statistics(Tensor logits, Tensor target, int vocab_start, int vocab_size, int ignore_index, "
    "float label_smoothing) -> Tensor",
    reference=reference.cross_entropy_statistics,
    fake=lambda logits, target, *rest: logits.new_empty((logits.shape[0], 2), dtype=_statistics_dtype(logits)),
)
_merge = define_op(
    "cross_entropy_merge(Tensor stats, Tensor target, int ignore_index, float z_loss) -> (Tensor loss, Tensor lse)",
    reference=reference.cross_entropy_merge,
    fake=lambda stats, *rest: (stats.new_empty(stats.shape[1]), stats.new_empty(stats.shape[1])),
)
_gradient = define_op(
    "cross_entropy_gradient(Tensor grad_loss, Tensor logits, Tensor target, Tensor lse, int vocab_start, "
    "int vocab_size, int ignore_index, float label_smoothing, float z_loss) -> Tensor",
    reference=reference.cross_entropy_gradient,
    fake=lambda grad_loss, logits, *rest: _contiguous_like(logits),
)


def cross_entropy_statistics(
    logits_shard: torch.Tensor,
    target: torch.Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """What one vocabulary shard contributes to the cross-entropy of each token.

    lse    = log(sum_j exp(x_j))                            over the real columns of this shard
    linear = -(1 - s) x_target [if owned] - (s / V) sum_j x_j

    Args:
        logits_shard: [T, V / R] float32, bfloat16, float16 or float64; this shard's columns, contiguous or rows with a
            stride (anything else is copied).
        target: [T] int64; global ids, the same on every shard.
        vocab_start: global id of this shard's first column.
        vocab_size: V, the true size of the vocabulary. Columns whose global id is not below it are padding: they are
            left out of everything. A shard may be padding alone (lse = -inf, linear = 0).
        ignore_index: tokens with this target get (0, 0), and their logits are not read.
        label_smoothing: s, spread over all V words.

    Returns:
        [T, 2] float32 (float64 for float64 logits): (lse, linear). Not differentiable by itself.

    Raises:
        InputError: wrong shapes or, on the CPU outside torch.compile, a target that is no word. On a GPU, where looking
            would cost a synchronisation, and under torch.compile such a token's linear, hence its loss, is NaN.
        TypeError: wrong dtypes.

    Communication: none.
    Memory: reads each logit once.
    Numerics: float32 inside, whatever the dtype of the logits; NaN and +inf logits give NaN.
    """
    _check_shard(logits_shard, target, vocab_start, vocab_size, label_smoothing)
    _check_targets(target, vocab_size, ignore_index)
    call = reference.cross_entropy_statistics if logits_shard.dtype == torch.float64 else _statistics
    rows = _with_dense_rows(logits_shard)
    return call(rows, target.contiguous(), vocab_start, vocab_size, ignore_index, label_smoothing)


def cross_entropy_merge(
    stats: torch.Tensor, target: torch.Tensor, *, ignore_index: int = -100, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each token from the statistics of all shards.

    lse = log(sum_r exp(lse_r));  loss = lse + sum_r linear_r + z lse^2;  loss = 0 where target == ignore_index

    Args:
        stats: [R, T, 2] float32 (or float64); the results of cross_entropy_statistics, one shard after the other.
        target: [T] int64.
        ignore_index: tokens with this target have loss 0.
        z_loss: z, the weight of lse^2, which keeps the logits from drifting (PaLM, arXiv:2204.02311).

    Returns:
        loss [T] and lse [T], in the dtype of stats. The order of the sum over shards is fixed.

    Raises:
        InputError: wrong shapes.
        TypeError: wrong dtypes.

    Communication: none; the caller has gathered stats.
    """
    check(stats.dim() == 3 and stats.shape[2] == 2, f"stats.shape={tuple(stats.shape)} must be (shards, tokens, 2)")
    check_shape("target", target, stats.shape[1:2])
    check_dtype("stats", stats, (torch.float32, torch.float64))
    check_dtype("target", target, (torch.int64,))
    call = reference.cross_entropy_merge if stats.dtype == torch.float64 else _merge
    return call(stats.contiguous(), target.contiguous(), ignore_index, z_loss)


def cross_entropy_gradient(
    grad_loss: torch.Tensor,
    logits_shard: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The gradient of the logits of one vocabulary shard.

    dx_j = grad_loss (exp(x_j - lse) (1 + 2 z lse) - s / V - (1 - s) [j == target]);  0 for padding and ignored tokens

    Args:
        grad_loss: [T] float; the gradient of each token's loss.
        logits_shard: [T, V / R]; as given to cross_entropy_statistics.
        target: [T] int64; global ids.
        lse: [T] float32 (float64 for float64 logits); of the whole vocabulary, from cross_entropy_merge.
        vocab_start, vocab_size, ignore_index, label_smoothing, z_loss: as in the forward.

    Returns:
        [T, V / R] in the dtype of the logits, contiguous, rounded once. NaN for a token whose target is no word.

    Raises:
        InputError: wrong shapes.
        TypeError: wrong dtypes.

    Communication: none.
    Memory: reads each logit and writes each gradient once.
    """
    _check_shard(logits_shard, target, vocab_start, vocab_size, label_smoothing)
    check_shape("grad_loss", grad_loss, target.shape)
    check_shape("lse", lse, target.shape)
    wide = _statistics_dtype(logits_shard)
    check_dtype("lse", lse, (wide,))
    call = reference.cross_entropy_gradient if wide == torch.float64 else _gradient
    return call(
        grad_loss.to(wide).contiguous(),
        _with_dense_rows(logits_shard),
        target.contiguous(),
        lse.contiguous(),
        vocab_start,
        vocab_size,
        ignore_index,
        label_smoothing,
        z_loss,
    )


class _CrossEntropy(torch.autograd.Function):
    """Loss of each token of whole logits [T, V]; saves the logits themselves, lse and target, and nothing of size V."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, ignore_index: int, label_smoothing: float, z_loss: float
    ) -> torch.Tensor:
        vocab_size = logits.shape[1]
        stats = _statistics(logits, target, 0, vocab_size, ignore_index, label_smoothing)
        loss, lse = _merge(stats.unsqueeze(0), target, ignore_index, z_loss)
        ctx.save_for_backward(logits, target, lse)
        ctx.arguments = (0, vocab_size, ignore_index, label_smoothing, z_loss)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError(
                "fused_megatron cross_entropy: the gradient of logits that are not float64 cannot be differentiated "
                "again (create_graph=True); use torch.nn.functional.cross_entropy for that"
            )
        logits, target, lse = ctx.saved_tensors
        return _gradient(grad_loss.contiguous(), logits, target, lse, *ctx.arguments), None, None, None, None


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of logits against class ids, on one device: torch.nn.functional.cross_entropy, fused.

    loss = lse - (1 - s) x_target - (s / V) sum_j x_j + z lse^2,  lse = log(sum_j exp(x_j))

    Args:
        logits: [V], [T, V] or [N, V, d1, ...] float32, bfloat16, float16 or float64. [T, V] with dense rows is read
            where it lies; the other layouts are brought there by a copy.
        target: [], [T] or [N, d1, ...] int64; class ids. (Class probabilities and class weights are not supported.)
        ignore_index: tokens with this target have loss 0 and gradient 0, and do not count in the mean.
        reduction: "mean" over the tokens that are not ignored (NaN if all are, as in torch), "sum" or "none".
        label_smoothing: s in [0, 1].
        z_loss: z, the weight of lse^2 (PaLM, arXiv:2204.02311); 0 as in torch.

    Returns:
        A scalar, or the shape of target for "none"; in the dtype of the logits, as torch (float32 under autocast).

    Raises:
        InputError: wrong shapes or arguments or, on the CPU outside torch.compile, a target that is no class. On a GPU
            and under torch.compile the loss and the gradient of such a token are NaN.
        TypeError: wrong dtypes.

    Communication: none.
    Memory: saves the logits (no copy), lse and target; forward reads each logit once, backward reads each logit and
        writes each gradient once.
    Numerics: float32 inside and one rounding, of the loss after the reduction and of each gradient; deterministic.
        float64 logits go through plain PyTorch, and can be differentiated twice; the others raise RuntimeError.
    """
    check(reduction in _REDUCTIONS, f"reduction={reduction!r} must be one of: {', '.join(_REDUCTIONS)}")
    rows, flat_target = _as_rows(logits, target)
    _check_shard(rows, flat_target, 0, rows.shape[1], label_smoothing)
    _check_targets(flat_target, rows.shape[1], ignore_index)
    if rows.dtype == torch.float64:
        loss = reference.cross_entropy(rows, flat_target, ignore_index, label_smoothing, z_loss)
    else:
        loss = _CrossEntropy.apply(_with_dense_rows(rows), flat_target, ignore_index, label_smoothing, z_loss)
    if reduction == "none":
        loss = loss.reshape(target.shape)
    else:
        loss = loss.sum()
        if reduction == "mean":
            loss = loss / (flat_target != ignore_index).sum()
    # torch's own op runs in float32 under autocast; ours always does inside, so that only the result differs.
    return loss if torch.is_autocast_enabled(logits.device.type) else loss.to(logits.dtype)


def _as_rows(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [T, V], target [T]) of any layout that torch.nn.functional.cross_entropy takes."""
    check(logits.dim() >= 1, "logits.shape=() must have a dimension of classes")
    if logits.dim() == 1:
        check_shape("target", target, ())
        return logits.unsqueeze(0), target.reshape(1)
    check_shape("target", target, (logits.shape[0], *logits.shape[2:]))
    rows = logits if logits.dim() == 2 else logits.movedim(1, -1).reshape(-1, logits.shape[1])
    return rows, target.reshape(-1).contiguous()


def _with_dense_rows(logits: torch.Tensor) -> torch.Tensor:
    """The logits, copied only if the columns do not lie side by side."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _check_shard(
    logits: torch.Tensor, target: torch.Tensor, vocab_start: int, vocab_size: int, label_smoothing: float
) -> None:
    check(logits.dim() == 2, f"logits.shape={tuple(logits.shape)} must be (tokens, columns)")
    check_shape("target", target, logits.shape[:1])
    check_dtype("logits", logits, _FLOATS)
    check_dtype("target", target, (torch.int64,))
    check_same_device("target", target, "logits", logits)
    check(vocab_start >= 0, f"vocab_start={vocab_start} must not be negative")
    check(vocab_size >= 1, f"vocab_size={vocab_size} must be at least 1")
    check(0.0 <= label_smoothing <= 1.0, f"label_smoothing={label_smoothing} must be in [0, 1]")


def _check_targets(target: torch.Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise for a target that is no word, where looking at the values costs no synchronisation and no graph break."""
    if torch.compiler.is_compiling() or type(target) is not torch.Tensor or target.device.type != "cpu":
        return
    invalid = ((target < 0) | (target >= vocab_size)) & (target != ignore_index)
    if invalid.any():
        position = int(invalid.nonzero()[0])
        raise InputError(
            f"target[{position}]={int(target[position])} must be in [0, {vocab_size}) or ignore_index={ignore_index}"
        )


for _name in ("cross_entropy_statistics", "cross_entropy_merge", "cross_entropy_gradient"):
    register_triton(_name, "cross_entropy")

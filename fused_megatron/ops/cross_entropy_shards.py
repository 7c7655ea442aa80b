"""Cross-entropy of vocabulary shards, in the pieces between which the shards communicate.

A shard of the vocabulary gives two numbers for each token, (lse, linear); those of all shards merge to the loss; and
the gradient of a shard needs the merged lse alone. So a loss over R shards takes one exchange of 8 bytes per token and
shard, and label smoothing, z-loss, soft-capped logits and ignored tokens come out exactly as on one device.
"""

from typing import Any

import torch

from fused_megatron.checks import InputError, check, check_dtype, check_same_device, check_shape
from fused_megatron.ops.registration import FLOAT_DTYPES, define_op, register_triton
from fused_megatron.reference import cross_entropy as reference

_NO_CAP = 0.0  # what the raw ops take for softcap=None


def _statistics_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


_GRADIENT_ARGUMENTS = (
    "Tensor target, Tensor lse, int vocab_start, int vocab_size, int ignore_index, float label_smoothing, "
    "float z_loss, float softcap"
)
statistics_op = define_op(
    "cross_entropy_statistics(Tensor logits, Tensor target, int vocab_start, int vocab_size, int ignore_index, "
    "float label_smoothing, float softcap) -> Tensor",
    reference=reference.cross_entropy_statistics,
    fake=lambda logits, target, *rest: logits.new_empty((logits.shape[0], 2), dtype=_statistics_dtype(logits)),
)
merge_op = define_op(
    "cross_entropy_merge(Tensor stats, Tensor target, int ignore_index, float z_loss) -> (Tensor loss, Tensor lse)",
    reference=reference.cross_entropy_merge,
    fake=lambda stats, *rest: (stats.new_empty(stats.shape[1]), stats.new_empty(stats.shape[1])),
)
gradient_op = define_op(
    f"cross_entropy_gradient(Tensor grad_loss, Tensor logits, {_GRADIENT_ARGUMENTS}) -> Tensor",
    reference=reference.cross_entropy_gradient,
    fake=lambda grad_loss, logits, *rest: torch.empty_like(logits, memory_format=torch.contiguous_format),
)
inplace_gradient_op = define_op(
    f"cross_entropy_gradient_(Tensor grad_loss, Tensor(a!) logits, {_GRADIENT_ARGUMENTS}) -> ()",
    reference=reference.cross_entropy_gradient_,
    fake=lambda *rest: None,
)


def cross_entropy_statistics(
    logits_shard: torch.Tensor,
    target: torch.Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    check_target: bool | None = None,
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
        softcap: c > 0: x is c tanh(logits / c) (Gemma 2, arXiv:2408.00118). None: the logits themselves.
        check_target: True raises for a target that is no word, wherever the tensors are: on a GPU that waits for it.
            None does so where it costs no wait, on the CPU outside torch.compile. False never does.

    Returns:
        [T, 2] float32 (float64 for float64 logits): (lse, linear). Not differentiable by itself.

    Raises:
        InputError: wrong shapes or arguments, or a target that is no word (check_target). Where nobody looks, such a
            token's linear, hence its loss, is NaN, and nothing is read out of bounds.
        TypeError: wrong dtypes.

    Communication: none.
    Memory: reads each logit once.
    Numerics: float32 inside, whatever the dtype of the logits; NaN and +inf logits give NaN.
    """
    cap = check_shard(logits_shard, target, vocab_start, vocab_size, label_smoothing, softcap)
    check_targets(target, vocab_size, ignore_index, check_target)
    call = reference.cross_entropy_statistics if logits_shard.dtype == torch.float64 else statistics_op
    rows = with_dense_rows(logits_shard)
    return call(rows, target.contiguous(), vocab_start, vocab_size, ignore_index, label_smoothing, cap)


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
    call = reference.cross_entropy_merge if stats.dtype == torch.float64 else merge_op
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
    softcap: float | None = None,
) -> torch.Tensor:
    """The gradient of the logits of one vocabulary shard.

    dx_j = grad_loss (exp(x_j - lse) (1 + 2 z lse) - s / V - (1 - s) [j == target]);  0 for padding and ignored tokens

    With a softcap, times the slope of c tanh(logits / c): 1 - (x_j / c)^2.

    Args:
        grad_loss: [T] float; the gradient of each token's loss.
        logits_shard: [T, V / R]; as given to cross_entropy_statistics.
        target: [T] int64; global ids.
        lse: [T] float32 (float64 for float64 logits); of the whole vocabulary, from cross_entropy_merge.
        vocab_start, vocab_size, ignore_index, label_smoothing, z_loss, softcap: as in the forward.

    Returns:
        [T, V / R] in the dtype of the logits, contiguous, rounded once. NaN for a token whose target is no word.

    Raises:
        InputError: wrong shapes or arguments.
        TypeError: wrong dtypes.

    Communication: none.
    Memory: reads each logit and writes each gradient once.
    """
    cap = check_shard(logits_shard, target, vocab_start, vocab_size, label_smoothing, softcap)
    per_token = _checked_per_token(grad_loss, logits_shard, target, lse)
    call: Any = reference.cross_entropy_gradient if logits_shard.dtype == torch.float64 else gradient_op
    terms = (vocab_start, vocab_size, ignore_index, label_smoothing, z_loss, cap)
    return call(per_token[0], with_dense_rows(logits_shard), *per_token[1:], *terms)


def cross_entropy_gradient_(
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
    softcap: float | None = None,
) -> torch.Tensor:
    """cross_entropy_gradient in place: the gradient overwrites the logits, and no other memory of their size is needed.

    Args:
        logits_shard: [T, V / R], rows dense and apart from each other; holds the gradient afterwards. Its version is
            counted up, so that autograd refuses a backward that would need the logits.
        grad_loss, target, lse, vocab_start, vocab_size, ignore_index, label_smoothing, z_loss, softcap: as in
            cross_entropy_gradient.

    Returns:
        logits_shard.

    Raises:
        InputError: wrong shapes or arguments, or logits whose rows are not dense or overlap.
        TypeError: wrong dtypes.

    Communication: none.
    Memory: reads each logit and writes each gradient once; allocates nothing.
    """
    cap = check_shard(logits_shard, target, vocab_start, vocab_size, label_smoothing, softcap)
    check(
        has_own_rows(logits_shard),
        f"logits_shard.stride()={logits_shard.stride()} must be of dense rows that do not overlap, to be overwritten "
        "(use cross_entropy_gradient, or make it contiguous)",
    )
    per_token = _checked_per_token(grad_loss, logits_shard, target, lse)
    call = reference.cross_entropy_gradient_ if logits_shard.dtype == torch.float64 else inplace_gradient_op
    terms = (vocab_start, vocab_size, ignore_index, label_smoothing, z_loss, cap)
    call(per_token[0], logits_shard, *per_token[1:], *terms)
    return logits_shard


# ---- Shared with the functions over these ------------------------------------------------------------------------


def with_dense_rows(logits: torch.Tensor) -> torch.Tensor:
    """The logits, copied only if the columns do not lie side by side."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def has_own_rows(logits: torch.Tensor) -> bool:
    """Whether columns lie side by side and no row shares memory with another."""
    rows, columns = logits.shape
    return (logits.stride(1) == 1 or columns <= 1) and (rows <= 1 or logits.stride(0) >= columns)


def check_shard(
    logits: torch.Tensor,
    target: torch.Tensor,
    vocab_start: int,
    vocab_size: int,
    label_smoothing: float,
    softcap: float | None,
) -> float:
    """Raise for what does not fit; returns what the raw ops take for softcap."""
    # Words are found for an error alone: a step of a tiny model makes these checks for every call.
    if logits.dim() != 2:
        raise InputError(f"logits.shape={tuple(logits.shape)} must be (tokens, columns)")
    check_shape("target", target, logits.shape[:1])
    check_dtype("logits", logits, FLOAT_DTYPES)
    check_dtype("target", target, (torch.int64,))
    check_same_device("target", target, "logits", logits)
    if vocab_start < 0:
        raise InputError(f"vocab_start={vocab_start} must not be negative")
    if vocab_size < 1:
        raise InputError(f"vocab_size={vocab_size} must be at least 1")
    if not 0.0 <= label_smoothing <= 1.0:
        raise InputError(f"label_smoothing={label_smoothing} must be in [0, 1]")
    if softcap is None:
        return _NO_CAP
    check(0.0 < softcap < float("inf"), f"softcap={softcap} must be above 0 and finite, or None for no cap")
    return softcap


def _checked_per_token(
    grad_loss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(grad_loss, target, lse) as the raw ops take them."""
    check_shape("grad_loss", grad_loss, target.shape)
    check_shape("lse", lse, target.shape)
    wide = _statistics_dtype(logits)
    check_dtype("lse", lse, (wide,))
    return grad_loss.to(wide).contiguous(), target.contiguous(), lse.contiguous()


def check_targets(target: torch.Tensor, vocab_size: int, ignore_index: int, check_target: bool | None = None) -> None:
    """Raise for a target that is no word; None: where looking costs neither a synchronisation nor a graph break."""
    compiling = torch.compiler.is_compiling()
    if check_target is None:
        check_target = not compiling and type(target) is torch.Tensor and target.device.type == "cpu"
    if not check_target or target.numel() == 0:
        return
    if not compiling:
        low, high = torch.aminmax(target)  # one quick look, enough where no token is ignored
        if low.item() >= 0 and high.item() < vocab_size:
            return
    invalid = ((target < 0) | (target >= vocab_size)) & (target != ignore_index)
    if compiling:
        # No graph breaks for it: an assertion inside the graph, which cannot say which target it was.
        torch._assert_async(~invalid.any(), f"target must be in [0, {vocab_size}) or ignore_index={ignore_index}")
    elif invalid.any():
        position = int(invalid.nonzero()[0])
        raise InputError(
            f"target[{position}]={int(target[position])} must be in [0, {vocab_size}) or ignore_index={ignore_index}"
        )


for _op in (statistics_op, merge_op, gradient_op, inplace_gradient_op):
    register_triton(_op._schema.name.partition("::")[2], "cross_entropy")

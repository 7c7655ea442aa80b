"""Cross-entropy of vocabulary shards, in the pieces between which the shards communicate.

A shard of the vocabulary gives three numbers for each token, (shift, log_sum, linear). The shift is a number near the
largest logit and is taken from all of them, so that a large common part of the logits costs no precision; the log of
the sum of their exponentials, lse, is shift + log_sum. The numbers of all shards merge to the loss, and the gradient of
a shard needs only the merged lse. So a loss over R shards takes one exchange of 12 bytes per token and shard, and label
smoothing, z-loss, soft-capped logits and ignored tokens come out exactly as on one device.
"""

from collections.abc import Callable
from typing import Any

import torch

from fused_megatron.checks import InputError, check, check_dtype, check_same_device, check_shape
from fused_megatron.ops.autograd_function import AutogradFunction, check_no_transform, transform_is_active
from fused_megatron.ops.registration import FLOAT_DTYPES, define_op, register_triton
from fused_megatron.reference import cross_entropy as reference
from fused_megatron.reference.cross_entropy import SCALARS, LossTerms

# ---- The pieces without checks, for tensors that have been checked ---------------------------------------------------


def _piece(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """What calls an op with its arguments, terms last: the op takes terms as numbers, and no float64."""
    in_plain_torch = getattr(reference, name)

    def of_scalars(*arguments: Any) -> Any:
        others, scalars = arguments[:-6], arguments[-6:]
        return in_plain_torch(*others, LossTerms.of_scalars(*scalars))

    op = define_op(f"{name}{schema}", reference=of_scalars, fake=fake)
    register_triton(name, "cross_entropy")

    def call(first: torch.Tensor, *rest: Any) -> Any:
        *others, terms = rest
        if first.dtype == torch.float64:
            return in_plain_torch(first, *others, terms)
        check_no_transform(f"ops.{name}", first, *others)
        return op(first, *others, *terms.scalars())

    return call


statistics_of_shard = _piece(
    "cross_entropy_statistics",
    f"(Tensor logits, Tensor target, {SCALARS}) -> Tensor",
    fake=lambda logits, target, *terms: logits.new_empty((logits.shape[0], 3), dtype=torch.float32),
)
merged_loss = _piece(
    "cross_entropy_merge",
    f"(Tensor stats, Tensor target, int num_columns, {SCALARS}) -> (Tensor loss, Tensor lse)",
    fake=lambda stats, *others: (stats.new_empty(stats.shape[1]), stats.new_empty((stats.shape[1], 2))),
)
gradient_of_shard = _piece(
    "cross_entropy_gradient",
    f"(Tensor grad_loss, Tensor logits, Tensor target, Tensor lse, {SCALARS}) -> Tensor",
    fake=lambda grad_loss, logits, *rest: torch.empty_like(logits, memory_format=torch.contiguous_format),
)
gradient_of_shard_ = _piece(
    "cross_entropy_gradient_",
    f"(Tensor grad_loss, Tensor(a!) logits, Tensor target, Tensor lse, {SCALARS}) -> ()",
    fake=lambda *arguments: None,
)


class Exchange:
    """What the shards of a vocabulary exchange, started before the work that hides it. This one: a single device.

    Attributes:
        num_shards: of the vocabulary.
        num_blocks: of how many ranks' rows a chunk of tokens consists, one block after the other.
    """

    num_shards = 1
    num_blocks = 1

    def start_hidden(self, rows: torch.Tensor) -> "Pending":
        """Rows [n, H] of this rank to those of the chunk [num_blocks n, H]."""
        return lambda: rows

    def start_statistics(self, stats: torch.Tensor) -> "Pending":
        """[t, 3] of this shard to [R, t, 3] of all."""
        return lambda: stats.unsqueeze(0)

    def start_dhidden(self, partial: torch.Tensor) -> "Pending":
        """This shard's part [num_blocks n, H] of the gradient to the sum, of this rank's rows [n, H]."""
        return lambda: partial


Pending = Callable[[], torch.Tensor]
"""Something under way; calling it, once, gives the result."""


def public_op(name: str, exchange: Exchange | None) -> str:
    """The op that a user called: of one device without an exchange, of tensor-parallel ranks with one."""
    return f"ops.{name}" if exchange is None else f"tensor_parallel.vocab_parallel_{name}"


class ShardLoss(AutogradFunction):
    """Loss of each token of logits [T, V / R]; saves the logits themselves, lse and target, and nothing of size V."""

    op = "ops.cross_entropy"

    @classmethod
    def op_of(cls, *args: Any) -> str:
        return public_op("cross_entropy", args[3])

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        terms: LossTerms,
        exchange: Exchange | None,
        inplace_backward: bool,
    ) -> torch.Tensor:
        stats = statistics_of_shard(logits, target, terms)
        all_stats = stats.unsqueeze(0) if exchange is None else exchange.start_statistics(stats)()
        loss, lse = merged_loss(all_stats, target, logits.shape[1], terms)
        ctx.save_for_backward(logits, target, lse)
        ctx.terms = terms
        ctx.inplace = inplace_backward
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> Any:
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:  # create_graph=True
            raise RuntimeError(
                "fused_megatron cross_entropy: the gradient of logits that are not float64 cannot be differentiated "
                "again (create_graph=True); use torch.nn.functional.cross_entropy for that"
            )
        logits, target, lse = ctx.saved_tensors
        grad_loss = grad_loss.contiguous()
        # The compiler plans memory by itself, and overwrites the logits where nothing needs them any more.
        if ctx.inplace and not compiling:
            dlogits = logits.detach()  # of the same version
            gradient_of_shard_(grad_loss, dlogits, target, lse, ctx.terms)
        else:
            dlogits = gradient_of_shard(grad_loss, logits, target, lse, ctx.terms)
        return dlogits, None, None, None, None


# ---- The pieces as users call them -----------------------------------------------------------------------------------


def cross_entropy_statistics(
    logits_shard: torch.Tensor, target: torch.Tensor, terms: LossTerms, *, check_target: bool | None = None
) -> torch.Tensor:
    """What one vocabulary shard contributes to the cross-entropy of each token.

    log_sum = log(sum_j exp(x_j - shift))                   over the real columns of this shard
    linear  = -(1 - s) (x_target - shift) [if owned] - (s / V) sum_j (x_j - shift)

    Args:
        logits_shard: [T, V / R] float32, bfloat16, float16 or float64; this shard's columns, contiguous or rows with a
            stride (anything else is copied).
        target: [T] int64; global ids, the same on every shard.
        terms: of the loss, with this shard's vocab_start. A shard of only padding gives (0, -inf, 0). Ignored tokens
            get zeros, and their logits are not read.
        check_target: True raises for a target that is no word, wherever the tensors are: on a GPU that waits for it.
            None does so where it costs no wait, on the CPU outside torch.compile. False never does.

    Returns:
        [T, 3] float32 (float64 for float64 logits): (shift, log_sum, linear), with a shift near the largest logit. Not
        differentiable by itself.

    Raises:
        InputError: wrong shapes, or a target that is no word (check_target). Where nobody looks, such a token's linear,
            hence its loss, is NaN, and nothing is read out of bounds.
        TypeError: wrong dtypes.

    Communication: none.
    Memory: reads each logit once.
    Numerics: float32 inside, whatever the dtype of the logits; NaN and +inf logits give NaN.
    """
    check_shard(logits_shard, target)
    check_targets(target, terms, check_target)
    stats: torch.Tensor = statistics_of_shard(with_dense_rows(logits_shard), target.contiguous(), terms)
    return stats


def cross_entropy_merge(
    stats: torch.Tensor, target: torch.Tensor, terms: LossTerms, *, num_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each token from the statistics of all shards.

    With a number M near the largest shift, and w_r = (1 - s) [if shard r owns the target] + (s / V) (words of shard r),
    which is 1 over all shards:

    lse  = M + log_sum,  log_sum = log(sum_r exp(shift_r - M + log_sum_r))
    loss = log_sum + sum_r (linear_r + w_r (M - shift_r)) + z lse^2;  loss = 0 where target == ignore_index

    Args:
        stats: [R, T, 3] float32 (or float64); the results of cross_entropy_statistics, one shard after the other.
        target: [T] int64.
        terms: of the loss; vocab_start has no effect.
        num_columns: of each shard, padding included: shard r begins at word r num_columns.

    Returns:
        loss [T], and lse [T, 2] as (M, log_sum); both in the dtype of stats. The order of the sum over shards is fixed.

    Raises:
        InputError: wrong shapes.
        TypeError: wrong dtypes.

    Communication: none; the caller has gathered stats.
    """
    check(stats.dim() == 3 and stats.shape[2] == 3, f"stats.shape={tuple(stats.shape)} must be (shards, tokens, 3)")
    check_shape("target", target, stats.shape[1:2])
    check_dtype("stats", stats, (torch.float32, torch.float64))
    check_dtype("target", target, (torch.int64,))
    loss, lse = merged_loss(stats.contiguous(), target.contiguous(), num_columns, terms)
    return loss, lse


def cross_entropy_gradient(
    grad_loss: torch.Tensor, logits_shard: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, terms: LossTerms
) -> torch.Tensor:
    """The gradient of the logits of one vocabulary shard.

    dx_j = grad_loss (exp(x_j - lse) (1 + 2 z lse) - s / V - (1 - s) [j == target]);  0 for padding and ignored tokens

    With a softcap, times the slope of c tanh(logits / c): 1 - (x_j / c)^2.

    Args:
        grad_loss: [T] float; the gradient of each token's loss.
        logits_shard: [T, V / R]; as given to cross_entropy_statistics.
        target: [T] int64; global ids.
        lse: [T, 2] float32 (float64 for float64 logits); of the whole vocabulary, from cross_entropy_merge.
        terms: as in the forward.

    Returns:
        [T, V / R] in the dtype of the logits, contiguous, rounded once. NaN for a token whose target is no word.

    Raises:
        InputError: wrong shapes.
        TypeError: wrong dtypes.

    Communication: none.
    Memory: reads each logit and writes each gradient once.
    """
    check_shard(logits_shard, target)
    grad_loss, target, lse = _checked_per_token(grad_loss, logits_shard, target, lse)
    gradient: torch.Tensor = gradient_of_shard(grad_loss, with_dense_rows(logits_shard), target, lse, terms)
    return gradient


def cross_entropy_gradient_(
    grad_loss: torch.Tensor, logits_shard: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, terms: LossTerms
) -> torch.Tensor:
    """cross_entropy_gradient in place: the gradient overwrites the logits, and no other memory of their size is needed.

    Args:
        logits_shard: [T, V / R], rows dense and apart from each other; holds the gradient afterwards. Its version is
            counted up, so that autograd refuses a backward that would need the logits.
        grad_loss, target, lse, terms: as in cross_entropy_gradient.

    Returns:
        logits_shard.

    Raises:
        InputError: wrong shapes, or logits whose rows are not dense or overlap.
        TypeError: wrong dtypes.

    Communication: none.
    Memory: reads each logit and writes each gradient once; allocates nothing.
    """
    check_shard(logits_shard, target)
    check(
        has_own_rows(logits_shard),
        f"logits_shard.stride()={logits_shard.stride()} must be of dense rows that do not overlap, to be overwritten "
        "(use cross_entropy_gradient, or make it contiguous)",
    )
    grad_loss, target, lse = _checked_per_token(grad_loss, logits_shard, target, lse)
    gradient_of_shard_(grad_loss, logits_shard, target, lse, terms)
    return logits_shard


# ---- Shared with the functions over these ------------------------------------------------------------------------


def with_dense_rows(logits: torch.Tensor) -> torch.Tensor:
    """The logits, copied only if the columns do not lie side by side."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def has_own_rows(logits: torch.Tensor) -> bool:
    """Whether columns lie side by side and no row shares memory with another."""
    rows, columns = logits.shape
    return (logits.stride(1) == 1 or columns <= 1) and (rows <= 1 or logits.stride(0) >= columns)


def check_shard(logits: torch.Tensor, target: torch.Tensor) -> None:
    """Raise unless logits [T, V / R] and target [T] fit together."""
    if logits.dim() != 2:
        raise InputError(f"logits.shape={tuple(logits.shape)} must be (tokens, columns)")
    check_shape("target", target, logits.shape[:1])
    check_dtype("logits", logits, FLOAT_DTYPES)
    check_dtype("target", target, (torch.int64,))
    check_same_device("target", target, "logits", logits)


def _checked_per_token(
    grad_loss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(grad_loss, target, lse) as the pieces take them."""
    check_shape("grad_loss", grad_loss, target.shape)
    check_shape("lse", lse, (*target.shape, 2))
    wide = torch.promote_types(logits.dtype, torch.float32)
    check_dtype("lse", lse, (wide,))
    return grad_loss.to(wide).contiguous(), target.contiguous(), lse.contiguous()


def check_targets(target: torch.Tensor, terms: LossTerms, check_target: bool | None = None) -> None:
    """Raise for a target that is no word; None: where looking costs neither a synchronisation nor a graph break."""
    compiling = torch.compiler.is_compiling()
    if check_target is None:
        # Inside a transform of torch.func a tensor may have no single value to look at.
        on_cpu = not compiling and type(target) is torch.Tensor and target.device.type == "cpu"
        check_target = on_cpu and not transform_is_active()
    if not check_target or target.numel() == 0:
        return
    vocab_size, ignore_index = terms.vocab_size, terms.ignore_index
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

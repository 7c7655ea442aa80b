"""Cross-entropy of vocabulary shards, as separate ops between which the shards communicate.

Each shard computes three numbers per token: (shift, log_sum, linear). The shift is a number near the largest logit and
is subtracted from all logits, so that a large offset common to all logits costs no precision; the log of the sum of
exponentials is lse = shift + log_sum. Merging the numbers of all shards gives the loss, and the gradient of a shard
needs only the merged lse. So a loss over R shards takes one exchange of 12 bytes per token and shard. Label smoothing,
z-loss, soft-capped logits and ignored tokens give exactly the result of one device.
"""

from collections.abc import Callable
from typing import Any

import torch

from fused_megatron.checks import InputError, check, check_dtype, check_same_device, check_shape
from fused_megatron.ops.autograd_function import AutogradFunction, check_no_transform, transform_is_active
from fused_megatron.ops.registration import FLOAT_DTYPES, define_op, register_triton
from fused_megatron.reference import cross_entropy as reference
from fused_megatron.reference.cross_entropy import SCALARS, LossTerms

# ---- The ops without argument checks, for tensors that have been checked --------------------------------------------


def _piece(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an op; return a function that takes LossTerms as last argument and runs float64 on the reference."""
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
    """Communication between vocabulary shards, started before the work that hides it. This base class: one device.

    Attributes:
        num_shards: number of shards of the vocabulary.
        num_blocks: number of ranks whose rows form a chunk of tokens, one block of rows after the other.
    """

    num_shards = 1
    num_blocks = 1

    def start_hidden(self, rows: torch.Tensor) -> "Pending":
        """Start gathering the rows [n, H] of each rank to the rows of the chunk [num_blocks n, H]."""
        return lambda: rows

    def start_statistics(self, stats: torch.Tensor) -> "Pending":
        """Start gathering the statistics [t, 3] of each shard to [R, t, 3]."""
        return lambda: stats.unsqueeze(0)

    def start_dhidden(self, partial: torch.Tensor) -> "Pending":
        """Start summing the shards' gradients [num_blocks n, H]; the result has this rank's rows [n, H]."""
        return lambda: partial


Pending = Callable[[], torch.Tensor]
"""A communication that has started; calling it, once, waits and returns the result."""


def public_op(name: str, exchange: Exchange | None) -> str:
    """Return the public name of the op that the user called: with an exchange, the tensor-parallel one."""
    return f"ops.{name}" if exchange is None else f"tensor_parallel.vocab_parallel_{name}"


class ShardLoss(AutogradFunction):
    """Loss of each token from logits [T, V / R]; saves the logits without a copy, lse and target."""

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
        # torch.compile plans memory by itself and overwrites the logits when nothing needs them any more.
        if ctx.inplace and not compiling:
            dlogits = logits.detach()  # shares the version counter of logits
            gradient_of_shard_(grad_loss, dlogits, target, lse, ctx.terms)
        else:
            dlogits = gradient_of_shard(grad_loss, logits, target, lse, ctx.terms)
        return dlogits, None, None, None, None


# ---- The ops with argument checks, as users call them ---------------------------------------------------------------


def cross_entropy_statistics(
    logits_shard: torch.Tensor, target: torch.Tensor, terms: LossTerms, *, check_target: bool | None = None
) -> torch.Tensor:
    """Compute the contribution of one vocabulary shard to the cross-entropy of each token.

    log_sum = log(sum_j exp(x_j - shift))                   over the real columns of this shard
    linear  = -(1 - s) (x_target - shift) [if owned] - (s / V) sum_j (x_j - shift)

    Args:
        logits_shard: [T, V / R] float32, bfloat16, float16 or float64; this shard's columns, dense within a row (copied
            if not).
        target: [T] int64; global ids, the same on every shard.
        terms: of the loss, with this shard's vocab_start. A shard of only padding gives (0, -inf, 0). Ignored tokens
            get zeros, and their logits are not read.
        check_target: True: always check that targets are valid (synchronises on a GPU). None: check only on the CPU and
            outside torch.compile, where no synchronisation is needed. False: never check.

    Returns:
        [T, 3] float32 (float64 for float64 logits): (shift, log_sum, linear), with a shift near the largest logit. The
        result is not differentiable.

    Raises:
        InputError: wrong shapes, or a target that is not a vocabulary entry (see check_target). If it is not checked,
            linear, and so the loss, of such a token is NaN, and nothing is read out of bounds.
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
    """Compute the loss of each token from the statistics of all shards.

    M is a number near the largest shift, and w_r = (1 - s) [if shard r owns the target] + (s / V) (entries of shard r);
    the w_r of all shards add up to 1:

    lse  = M + log_sum,  log_sum = log(sum_r exp(shift_r - M + log_sum_r))
    loss = log_sum + sum_r (linear_r + w_r (M - shift_r)) + z lse^2;  loss = 0 where target == ignore_index

    Args:
        stats: [R, T, 3] float32 (or float64); the results of cross_entropy_statistics, one shard after the other.
        target: [T] int64.
        terms: of the loss; vocab_start has no effect.
        num_columns: columns of each shard with its padding: shard r begins at vocabulary entry r num_columns.

    Returns:
        loss [T], and lse [T, 2] as (M, log_sum); both in the dtype of stats. Shards are summed in a fixed order.

    Raises:
        InputError: wrong shapes.
        TypeError: wrong dtypes.

    Communication: none; the caller gathers stats.
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
    """Compute the gradient of the logits of one vocabulary shard.

    dx_j = grad_loss (exp(x_j - lse) (1 + 2 z lse) - s / V - (1 - s) [j == target]);  0 for padding and ignored tokens

    With a softcap, multiplied by the derivative of c tanh(logits / c): 1 - (x_j / c)^2.

    Args:
        grad_loss: [T] float; the gradient of each token's loss.
        logits_shard: [T, V / R]; the argument of cross_entropy_statistics.
        target: [T] int64; global ids.
        lse: [T, 2] float32 (float64 for float64 logits); the result of cross_entropy_merge.
        terms: as in cross_entropy_statistics.

    Returns:
        [T, V / R] in the dtype of the logits, contiguous, rounded once. NaN for a token with an invalid target.

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
    """Compute cross_entropy_gradient in place: the gradient overwrites the logits.

    Args:
        logits_shard: [T, V / R], dense rows that do not overlap; overwritten. Its version counter increases, so that
            autograd refuses a backward that needs the logits.
        grad_loss, target, lse, terms: as in cross_entropy_gradient.

    Returns:
        logits_shard.

    Raises:
        InputError: wrong shapes, or logits with rows that are not dense or that overlap.
        TypeError: wrong dtypes.

    Communication: none.
    Memory: reads each logit and writes each gradient once; allocates nothing.
    """
    check_shard(logits_shard, target)
    check(
        has_own_rows(logits_shard),
        f"logits_shard.stride()={logits_shard.stride()} must have dense rows that do not overlap, to be overwritten "
        "(use cross_entropy_gradient, or make it contiguous)",
    )
    grad_loss, target, lse = _checked_per_token(grad_loss, logits_shard, target, lse)
    gradient_of_shard_(grad_loss, logits_shard, target, lse, terms)
    return logits_shard


# ---- Shared with the ops that are built on these -----------------------------------------------------------------


def with_dense_rows(logits: torch.Tensor) -> torch.Tensor:
    """Return the logits, copied only if their rows are not dense."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def has_own_rows(logits: torch.Tensor) -> bool:
    """Return whether rows are dense and do not overlap."""
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
    """Check the tensors that have a value per token and return (grad_loss, target, lse) as the ops take them."""
    check_shape("grad_loss", grad_loss, target.shape)
    check_shape("lse", lse, (*target.shape, 2))
    wide = torch.promote_types(logits.dtype, torch.float32)
    check_dtype("lse", lse, (wide,))
    return grad_loss.to(wide).contiguous(), target.contiguous(), lse.contiguous()


def check_targets(target: torch.Tensor, terms: LossTerms, check_target: bool | None = None) -> None:
    """Raise for a target that is not a vocabulary entry; None: only if that needs no synchronisation or graph break."""
    compiling = torch.compiler.is_compiling()
    if check_target is None:
        # Inside a transform of torch.func a tensor may have no values.
        on_cpu = not compiling and type(target) is torch.Tensor and target.device.type == "cpu"
        check_target = on_cpu and not transform_is_active()
    if not check_target or target.numel() == 0:
        return
    vocab_size = terms.vocab_size
    ignore_index = terms.ignore_index
    if not compiling:
        low, high = torch.aminmax(target)  # fast, and enough if no token is ignored
        if low.item() >= 0 and high.item() < vocab_size:
            return
    invalid = ((target < 0) | (target >= vocab_size)) & (target != ignore_index)
    if compiling:
        # An assertion inside the graph avoids a graph break; its message cannot name the target.
        torch._assert_async(~invalid.any(), f"target must be in [0, {vocab_size}) or ignore_index={ignore_index}")
    elif invalid.any():
        position = int(invalid.nonzero()[0])
        raise InputError(
            f"target[{position}]={int(target[position])} must be in [0, {vocab_size}) or ignore_index={ignore_index}"
        )

"""A linear head and its cross-entropy in one op, which holds only a tile of the logits in memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fused_megatron.checks import InputError, check, check_dtype, check_same_device, check_shape
from fused_megatron.ops.autograd_function import AutogradFunction
from fused_megatron.ops.cross_entropy_shards import Exchange, check_targets, public_op
from fused_megatron.ops.linear_cross_entropy_tile_shape import tiles_of
from fused_megatron.ops.linear_cross_entropy_tiles import TiledHead
from fused_megatron.ops.registration import FLOAT_DTYPES, define_composed_op
from fused_megatron.reference import linear_cross_entropy as reference
from fused_megatron.reference.cross_entropy import SCALARS, LossTerms

_REDUCTIONS = ("mean", "sum", "none")
_NO_GRADIENTS = [False, False, False]
_HEAD = f"Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int? chunk_tokens, {SCALARS}"

# ---- Forward and backward: ops for torch.compile, which does not trace the tiles; eager mode calls them directly -----


def _forward_on_tiles(
    upstream: torch.Tensor | None, needs: Sequence[bool], *head: Any, exchange: Exchange | None = None
) -> tuple[torch.Tensor, ...]:
    tiles = _tiled_head(*head, exchange=exchange, one_pass=upstream is not None)
    loss, lse, gradients = tiles.forward(upstream, needs)
    return loss, lse, *_present(gradients, loss)


def _backward_on_tiles(
    grad_loss: torch.Tensor,
    lse: torch.Tensor,
    needs: Sequence[bool],
    *head: Any,
    exchange: Exchange | None = None,
) -> tuple[torch.Tensor, ...]:
    return _present(_tiled_head(*head, exchange=exchange).backward(grad_loss, lse, needs), lse)


def _tiled_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    chunk_tokens: int | None,
    *scalars: Any,
    exchange: Exchange | None,
    one_pass: bool = False,
) -> TiledHead:
    terms = LossTerms.of_scalars(*scalars)
    return TiledHead(hidden, weight, bias, target, terms, chunk_tokens, exchange or Exchange(), one_pass)


def _present(gradients: Sequence[torch.Tensor | None], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Replace a gradient that is not needed by an empty tensor: an op must return tensors."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_forward(upstream: Any, needs: Sequence[bool], *head: Any) -> tuple[torch.Tensor, ...]:
    num_tokens = head[0].shape[0]
    loss = _wide_like(head[0], (num_tokens,))
    lse = _wide_like(head[0], (num_tokens, 2))
    gradients = [_wide_like(x, x.shape) if needed else None for x, needed in zip(head, needs, strict=False)]
    return loss, lse, *_present(gradients, loss)


def _fake_backward(grad_loss: Any, lse: torch.Tensor, needs: Sequence[bool], *head: Any) -> tuple[torch.Tensor, ...]:
    return _present([torch.empty_like(x) if needed else None for x, needed in zip(head, needs, strict=False)], lse)


def _wide_like(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


_forward = define_composed_op(
    f"linear_cross_entropy_forward(Tensor? upstream, bool[3] needs, {_HEAD}) -> "
    "(Tensor loss, Tensor lse, Tensor dhidden, Tensor dweight, Tensor dbias)",
    implementation=_forward_on_tiles,
    fake=_fake_forward,
)
_backward = define_composed_op(
    f"linear_cross_entropy_backward(Tensor grad_loss, Tensor lse, bool[3] needs, {_HEAD}) -> "
    "(Tensor dhidden, Tensor dweight, Tensor dbias)",
    implementation=_backward_on_tiles,
    fake=_fake_backward,
)


def _run_forward(exchange: Exchange | None, *arguments: Any) -> Any:
    by_op = exchange is None and torch.compiler.is_compiling()
    return _forward(*arguments) if by_op else _forward_on_tiles(*arguments, exchange=exchange)


def _run_backward(exchange: Exchange | None, *arguments: Any) -> Any:
    by_op = exchange is None and torch.compiler.is_compiling()
    return _backward(*arguments) if by_op else _backward_on_tiles(*arguments, exchange=exchange)


# ---- Autograd --------------------------------------------------------------------------------------------------------


class _LossOfEachToken(AutogradFunction):
    """Loss [T] of each token, for any upstream gradient: saves inputs and lse; backward recomputes the logits."""

    op = "ops.linear_cross_entropy"

    @classmethod
    def op_of(cls, *args: Any) -> str:
        return public_op("linear_cross_entropy", args[5])

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        settings: tuple[Any, ...],
        exchange: Exchange | None,
    ) -> torch.Tensor:
        loss, lse, *_ = _run_forward(exchange, None, _NO_GRADIENTS, hidden, weight, bias, target, *settings)
        ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.settings = settings
        ctx.exchange = exchange
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> Any:
        _refuse_second_derivative()
        *inputs, lse = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        gradients = _run_backward(ctx.exchange, grad_loss.to(lse.dtype), lse, needs, *inputs, *ctx.settings)
        return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None, None, None


class _SumOverCount(AutogradFunction):
    """Sum of the losses / count. Forward computes the gradients for an upstream gradient of 1; backward scales them.

    The gradients are float32 until they are scaled, so that each is rounded once. With float16, backward also divides
    by count: dividing the logits' gradients earlier would push small ones below the range of float16.
    """

    op = "ops.linear_cross_entropy"

    @classmethod
    def op_of(cls, *args: Any) -> str:
        return public_op("linear_cross_entropy", args[6])

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        count: torch.Tensor,
        settings: tuple[Any, ...],
        exchange: Exchange | None,
        sum_dtype: torch.dtype,
        dweight_sum: Callable[[], torch.Tensor] | None,
    ) -> torch.Tensor:
        scale = count.clamp(min=1.0).reciprocal()
        now = torch.ones_like(scale) if hidden.dtype == torch.float16 else scale
        needs = list(ctx.needs_input_grad[:3])
        loss, lse, *gradients = _run_forward(exchange, now, needs, hidden, weight, bias, target, *settings)
        ctx.settings = settings
        ctx.exchange = exchange
        ctx.dweight_sum = dweight_sum
        ctx.gradients = None
        if torch.compiler.is_compiling():
            ctx.save_for_backward(hidden, weight, bias, target, lse, scale, *gradients)
        else:
            ctx.save_for_backward(hidden, weight, bias, target, lse, scale)
            ctx.gradients = gradients  # for the first backward, which scales them in place
        return loss.sum(dtype=sum_dtype) / count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        _refuse_second_derivative()
        *inputs, target, lse, scale = ctx.saved_tensors[:6]
        saved = ctx.saved_tensors[6:]
        needs = list(ctx.needs_input_grad[:3])
        grad = grad.to(lse.dtype)
        factor = grad * scale if inputs[0].dtype == torch.float16 else grad
        by_compiler = len(saved) > 0  # the compiler may need the saved gradients again: do not overwrite them
        gradients = saved if by_compiler else ctx.gradients
        ctx.gradients = None
        if gradients is None:  # a second backward, with retain_graph=True
            every = (grad * scale).expand(len(lse))
            gradients = _run_backward(ctx.exchange, every, lse, needs, *inputs, target, *ctx.settings)
            factor = torch.ones_like(grad)
        if needs[1] and ctx.dweight_sum is not None:
            _add_scaled_(ctx.dweight_sum(), gradients[1], factor)
            needs[1] = False
        results = [
            _scaled(gradient, factor, in_place=not by_compiler).to(x.dtype) if needed else None
            for gradient, x, needed in zip(gradients, inputs, needs, strict=True)
        ]
        return *results, None, None, None, None, None, None


def _refuse_second_derivative() -> None:
    """Raise in a backward with create_graph=True: autograd does not see the products that it computes."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        raise RuntimeError(
            "fused_megatron linear_cross_entropy: the gradient of operands that are not float64 cannot be "
            "differentiated again (create_graph=True); use torch.nn.functional.linear and cross_entropy for that"
        )


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, *, in_place: bool) -> torch.Tensor:
    """Return gradient * factor; factor is a scalar tensor []."""
    if not in_place:
        return gradient * factor
    # On a CPU reading the factor costs nothing, and often saves a pass over the gradient.
    return gradient if factor.is_cpu and factor.item() == 1.0 else gradient.mul_(factor)


def _add_scaled_(total: torch.Tensor, gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """Add factor * gradient to total in one pass, without a GPU synchronisation."""
    if factor.is_cpu:
        total.add_(gradient, alpha=factor.item())
    else:
        total.addcmul_(gradient, factor)


def loss_of_tiles(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    terms: LossTerms,
    chunk_tokens: int | None,
    *,
    sum_dtype: torch.dtype | None,
    count: torch.Tensor | None = None,
    exchange: Exchange | None = None,
    dweight_sum: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute the loss of a head from checked arguments.

    Args:
        hidden: [n, H], contiguous, in the dtype of the products' operands.
        weight, bias: of this shard of the vocabulary.
        target: [T] int64; of the tokens of all ranks.
        terms, chunk_tokens: as in TiledHead.
        sum_dtype: dtype of the sum of the losses; None: return the loss of each token.
        count: divisor of the sum; None: 1.
        exchange: between the shards of the vocabulary; None if one device has the full vocabulary.
        dweight_sum: the backward of a sum adds the weight's gradient to the tensor that this returns.
    """
    settings = (chunk_tokens, *terms.scalars())
    leaves = (hidden, weight, bias)
    # Every rank decides the same: shapes, dtypes and requires_grad are equal on all ranks.
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    num_entries = weight.shape[0]
    one_pass = learns and tiles_of(hidden, len(target), num_entries, chunk_tokens).entries >= num_entries
    if sum_dtype is None or not one_pass:
        losses: torch.Tensor = _LossOfEachToken.apply(*leaves, target, settings, exchange)
        if sum_dtype is None:
            return losses
        total = losses.sum(dtype=sum_dtype)
        return total if count is None else total / count
    if count is None:
        count = hidden.new_ones((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return _SumOverCount.apply(*leaves, target, count, settings, exchange, sum_dtype, dweight_sum)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Cross-entropy of a linear head: F.cross_entropy(F.linear(hidden, weight, bias), target) without all logits.

    x = hidden @ weight.T + bias, for one chunk of tokens at a time;  x = c tanh(x / c) with softcap c
    loss = lse - (1 - s) x_target - (s / V) sum_j x_j + z lse^2,  lse = log(sum_j exp(x_j))

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64; copied once if not contiguous.
        weight: [V, H]; may have another dtype: products are computed in the wider dtype of both (bfloat16 with float16:
            float32), under autocast in the dtype of autocast, as in torch.nn.functional.linear.
        target: [...] int64; ids of vocabulary entries.
        bias: [V] or None.
        ignore_index: tokens with this target have loss 0 and gradient 0, and do not count in the mean.
        reduction: "mean" over the tokens that are not ignored (NaN if all are, as in torch), "sum" or "none".
        label_smoothing: s in [0, 1], spread over the vocabulary without padding.
        z_loss: z, the weight of lse^2 (PaLM, arXiv:2204.02311).
        softcap: c; limits logits to (-c, c) (Gemma 2, arXiv:2408.00118). None: no limit.
        vocab_size: number of vocabulary entries without padding; later rows of weight are not read, and their gradient
            is 0. None: V.
        chunk_tokens: tokens of a tile of logits. None: as many as fit in 256 MiB on a GPU, 100 MiB on a CPU.
        dtype: of the loss, as in torch.softmax: float32 for models that convert their logits before the loss. None: the
            dtype of the product, as in torch (float32 under autocast).

    Returns:
        A scalar, or the shape of target for "none"; in `dtype`.

    Raises:
        InputError: wrong shapes or arguments or, on the CPU outside torch.compile, a target that is not a vocabulary
            entry. On a GPU and under torch.compile the loss and the gradients of such a token are NaN.
        TypeError: wrong dtypes.

    Communication: none; tensor_parallel.vocab_parallel_linear_cross_entropy is this op for shards of the vocabulary.
    Memory: one tile of logits, and the gradients. With "mean" and "sum" the forward computes the gradients (float32, 3
        products in all) and keeps them until backward. With "none", and for 16-bit operands on a CPU without matrix
        units, it saves hidden and weight, and backward recomputes the logits (4 products). An input that needs no
        gradient costs no product.
    Numerics: float32 inside. On a GPU, logits and their gradients are rounded to the dtype of the product; gradients of
        the parameters are summed in float32 and rounded once. Deterministic. A second backward (retain_graph=True)
        gives the same gradients. float64 runs in plain PyTorch with all logits in memory and can be differentiated
        twice; for other dtypes that raises RuntimeError.
    """
    check(reduction in _REDUCTIONS, f"reduction={reduction!r} must be one of: {', '.join(_REDUCTIONS)}")
    check_head(hidden, weight, bias, target, chunk_tokens)
    size = weight.shape[0] if vocab_size is None else vocab_size
    check(1 <= size <= weight.shape[0], f"vocab_size={size} must be in [1, weight.shape[0]={weight.shape[0]}]")
    terms = LossTerms(size, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap)
    operand_dtype, result_dtype = operand_and_result_dtype(hidden, weight)
    rows = hidden.to(operand_dtype).reshape(-1, weight.shape[1]).contiguous()
    ids = target.reshape(-1).contiguous()
    check_targets(ids, terms)
    count = (ids != ignore_index).sum().float() if reduction == "mean" else None
    if operand_dtype == torch.float64:
        losses = reference.linear_cross_entropy(rows, weight, bias, ids, terms)
        total = losses if reduction == "none" else losses.sum() if count is None else losses.sum() / count
    else:
        sum_dtype = None if reduction == "none" else torch.float32
        total = loss_of_tiles(rows, weight, bias, ids, terms, chunk_tokens, sum_dtype=sum_dtype, count=count)
    return (total.view(target.shape) if reduction == "none" else total).to(dtype or result_dtype)


def operand_and_result_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype of the product's operands and the dtype of the loss, by torch's rules of type promotion."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type), torch.float32
    return dtype, dtype


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    chunk_tokens: int | None,
    weight_name: str = "weight",
) -> None:
    """Raise unless the arguments fit together; target must have the shape of hidden without the last dim."""
    check(weight.dim() == 2, f"{weight_name}.shape={tuple(weight.shape)} must be (vocabulary, hidden_size)")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise InputError(
            f"hidden.shape={tuple(hidden.shape)} must end in hidden_size={weight.shape[1]} "
            f"({weight_name}.shape={tuple(weight.shape)})"
        )
    check_shape("target", target, hidden.shape[:-1])
    for name, tensor in (("hidden", hidden), (weight_name, weight), ("bias", bias)):
        if tensor is not None:
            check_dtype(name, tensor, FLOAT_DTYPES)
            check_same_device(name, tensor, "target", target)
    check_dtype("target", target, (torch.int64,))
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1])
    check(chunk_tokens is None or chunk_tokens >= 1, f"chunk_tokens={chunk_tokens} must be at least 1, or None")

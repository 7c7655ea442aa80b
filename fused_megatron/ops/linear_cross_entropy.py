"""A linear head and its cross-entropy in one op: the logits of a few tokens at a time, never whole."""

from typing import Any

import torch

from fused_megatron.checks import InputError, check, check_dtype, check_same_device, check_shape
from fused_megatron.ops.cross_entropy_shards import check_targets
from fused_megatron.ops.linear_cross_entropy_tiles import LossTerms, TiledHead, fits_one_pass
from fused_megatron.ops.registration import FLOAT_DTYPES, define_composed_op
from fused_megatron.reference import linear_cross_entropy as reference

_REDUCTIONS = ("mean", "sum", "none")
_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int vocab_size, int ignore_index, "
    "float label_smoothing, float z_loss, float? softcap, int? chunk_tokens"
)


def _tiled_head(hidden: Any, weight: Any, bias: Any, target: Any, *terms: Any) -> TiledHead:
    *of_loss, chunk_tokens = terms
    return TiledHead(hidden, weight, bias, target, LossTerms(*of_loss), chunk_tokens)


def _present(gradients: list[torch.Tensor | None], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """An op returns tensors: an empty one for a gradient that is not needed."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _losses_on_tiles(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _tiled_head(*arguments).losses()


def _gradients_on_tiles(
    grad_loss: torch.Tensor, lse: torch.Tensor, needs: list[bool], hidden: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    return _present(_tiled_head(hidden, *rest).gradients(grad_loss, lse, list(needs)), hidden)


def _losses_and_gradients_on_tiles(
    grad_loss: torch.Tensor, needs: list[bool], hidden: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    loss, lse, gradients = _tiled_head(hidden, *rest).losses_and_gradients(grad_loss, list(needs))
    return loss, lse, *_present(gradients, hidden)


def _fake_losses(hidden: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return tuple(hidden.new_empty(hidden.shape[:1], dtype=torch.float32) for _ in range(2))


def _fake_gradients(grad_loss: Any, lse: Any, needs: list[bool], *rest: Any) -> tuple[torch.Tensor, ...]:
    return _present([torch.empty_like(x) if n else None for n, x in zip(needs, rest, strict=False)], rest[0])


def _fake_losses_and_gradients(grad_loss: Any, needs: list[bool], *rest: Any) -> tuple[torch.Tensor, ...]:
    wide = [x.new_empty(x.shape, dtype=torch.float32) if n else None for n, x in zip(needs, rest, strict=False)]
    return *_fake_losses(*rest), *_present(wide, rest[0])


_losses = define_composed_op(
    f"linear_cross_entropy_losses({_ARGUMENTS}) -> (Tensor loss, Tensor lse)",
    implementation=_losses_on_tiles,
    fake=_fake_losses,
)
_gradients = define_composed_op(
    f"linear_cross_entropy_gradients(Tensor grad_loss, Tensor lse, bool[3] needs, {_ARGUMENTS}) -> "
    "(Tensor dhidden, Tensor dweight, Tensor dbias)",
    implementation=_gradients_on_tiles,
    fake=_fake_gradients,
)
_losses_and_gradients = define_composed_op(
    f"linear_cross_entropy_losses_and_gradients(Tensor grad_loss, bool[3] needs, {_ARGUMENTS}) -> "
    "(Tensor loss, Tensor lse, Tensor dhidden, Tensor dweight, Tensor dbias)",
    implementation=_losses_and_gradients_on_tiles,
    fake=_fake_losses_and_gradients,
)


def refuse_second_derivative() -> None:
    """Raise in a backward that is to be differentiated: autograd does not see the products that it makes."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        raise RuntimeError(
            "fused_megatron linear_cross_entropy: the gradient of operands that are not float64 cannot be "
            "differentiated again (create_graph=True); use torch.nn.functional.linear and cross_entropy for that"
        )


def scaled_(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """gradient *= factor []."""
    # Looking at the number costs nothing on a CPU, and often saves the pass.
    return gradient if factor.is_cpu and factor.item() == 1.0 else gradient.mul_(factor)


class _LossOfEachToken(torch.autograd.Function):
    """Loss [T] for any upstream gradient: saves what it was given, and lse; backward makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor,
        terms: tuple[Any, ...],
    ) -> torch.Tensor:  # fmt: skip
        loss, lse = _losses(hidden, weight, bias, target, *terms)
        ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.terms = terms
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> Any:
        refuse_second_derivative()
        *inputs, lse = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        gradients = _gradients(grad_loss.float(), lse, needs, *inputs, *ctx.terms)
        return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None, None


class _SumOverCount(torch.autograd.Function):
    """sum of the losses / count: the gradients are made with it, for an upstream gradient of 1, and scaled backward.

    They are float32 until then, so that each is rounded once. For float16, 1 / count waits until then, too: it would
    push small gradients of logits below the range of float16.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor,
        count: torch.Tensor, terms: tuple[Any, ...],
    ) -> torch.Tensor:  # fmt: skip
        scale = count.clamp(min=1.0).reciprocal()
        now = torch.ones_like(scale) if hidden.dtype == torch.float16 else scale
        needs = list(ctx.needs_input_grad[:3])
        loss, lse, *gradients = _losses_and_gradients(now, needs, hidden, weight, bias, target, *terms)
        ctx.terms = terms
        ctx.gradients = None
        if torch.compiler.is_compiling():
            ctx.save_for_backward(hidden, weight, bias, target, lse, scale, *gradients)
        else:
            ctx.save_for_backward(hidden, weight, bias, target, lse, scale)
            ctx.gradients = gradients  # for the first backward, which scales them where they lie
        return loss.sum() / count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative()
        hidden, weight, bias, target, lse, scale, *saved = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        later = grad * scale if hidden.dtype == torch.float16 else grad
        made, ctx.gradients = ctx.gradients, None
        if saved:  # under torch.compile
            made = [gradient * later for gradient in saved]
        elif made is not None:
            made = [scaled_(gradient, later) for gradient in made]
        else:  # once more, with retain_graph=True
            every = (grad * scale).expand(len(lse))
            made = _gradients(every, lse, needs, hidden, weight, bias, target, *ctx.terms)
        inputs = zip(made, (hidden, weight, bias), needs, strict=True)
        return *(g.to(x.dtype) if needed else None for g, x, needed in inputs), None, None, None


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
) -> torch.Tensor:
    """Cross-entropy of a linear head: F.cross_entropy(F.linear(hidden, weight, bias), target) without the logits.

    x = hidden @ weight.T + bias, made for a chunk of tokens at a time;  x = c tanh(x / c) with softcap c
    loss = lse - (1 - s) x_target - (s / V) sum_j x_j + z lse^2,  lse = log(sum_j exp(x_j))

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64; copied once if its rows do not lie one after the other.
        weight: [V, H]; may be of another dtype: the products are made in the wider of both (bfloat16 with float16:
            float32), under autocast in its dtype, as torch.nn.functional.linear.
        target: [...] int64; word ids.
        bias: [V] or None.
        ignore_index: tokens with this target have loss 0 and gradient 0, and do not count in the mean.
        reduction: "mean" over the tokens that are not ignored (NaN if all are, as in torch), "sum" or "none".
        label_smoothing: s in [0, 1], spread over the vocabulary without padding.
        z_loss: z, the weight of lse^2 (PaLM, arXiv:2204.02311).
        softcap: c; logits are squashed into (-c, c) (Gemma 2, arXiv:2408.00118). None: they are not.
        vocab_size: the true number of words; rows of weight from there on are padding: not read, gradient 0.
        chunk_tokens: tokens of a tile of logits. None: by its bytes (256 MiB on a GPU, 100 MiB on a CPU).

    Returns:
        A scalar, or the shape of target for "none"; in the dtype of the product, as torch (float32 under autocast).

    Raises:
        InputError: wrong shapes or arguments or, on the CPU outside torch.compile, a target that is no word. On a GPU
            and under torch.compile the loss and the gradients of such a token are NaN.
        TypeError: wrong dtypes.

    Communication: none; tensor_parallel.vocab_parallel_linear_cross_entropy is this op for shards of the vocabulary.
    Memory: one tile of logits, and the gradients. With "mean" and "sum" the gradients are made forward (float32, 3
        products in all) and held until backward; with "none", and for 16-bit operands on a CPU without matrix units,
        hidden and weight are saved, and the logits made again (4 products). What needs no gradient costs no product.
    Numerics: float32 inside. Logits and their gradients are rounded to the dtype of the product on a GPU; gradients of
        the parameters are summed in float32 and rounded once. Deterministic. A second backward (retain_graph=True)
        gives the same; float64 goes through plain PyTorch with whole logits and can be differentiated twice, the
        others raise RuntimeError.
    """
    check(reduction in _REDUCTIONS, f"reduction={reduction!r} must be one of: {', '.join(_REDUCTIONS)}")
    check_head(hidden, weight, bias, target, label_smoothing, softcap, chunk_tokens)
    words = weight.shape[0] if vocab_size is None else vocab_size
    check(1 <= words <= weight.shape[0], f"vocab_size={words} must be in [1, weight.shape[0]={weight.shape[0]}]")
    dtype, result_dtype = operand_and_result_dtype(hidden, weight)
    rows, ids = hidden.to(dtype).reshape(-1, weight.shape[1]).contiguous(), target.reshape(-1).contiguous()
    check_targets(ids, words, ignore_index)
    loss_terms = (words, ignore_index, label_smoothing, z_loss, softcap)
    terms = (*loss_terms, chunk_tokens)
    count = (ids != ignore_index).sum().float() if reduction == "mean" else None
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (rows, weight, bias))
    if dtype == torch.float64:
        losses = reference.linear_cross_entropy(rows, weight, bias, ids, *loss_terms)
    elif reduction != "none" and learns and fits_one_pass(rows, weight.shape[0], chunk_tokens):
        count = torch.ones((), device=rows.device) if count is None else count
        return _SumOverCount.apply(rows, weight, bias, ids, count, terms).to(result_dtype)
    else:
        losses = _LossOfEachToken.apply(rows, weight, bias, ids, terms)
    if reduction == "none":
        return losses.view(target.shape).to(result_dtype)
    total = losses.sum()
    return (total if count is None else total / count).to(result_dtype)


def operand_and_result_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype that the operands of the product are brought to, and that of the loss; as torch, if it promoted."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type), torch.float32
    return dtype, dtype


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    label_smoothing: float,
    softcap: float | None,
    chunk_tokens: int | None,
    weight_name: str = "weight",
) -> None:
    """Raise unless the tensors and numbers fit together; the shape of target is that of hidden without its last dim."""
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
    check(0.0 <= label_smoothing <= 1.0, f"label_smoothing={label_smoothing} must be in [0, 1]")
    capped = softcap is None or 0.0 < softcap < float("inf")
    check(capped, f"softcap={softcap} must be above 0 and finite, or None for no cap")
    check(chunk_tokens is None or chunk_tokens >= 1, f"chunk_tokens={chunk_tokens} must be at least 1, or None")

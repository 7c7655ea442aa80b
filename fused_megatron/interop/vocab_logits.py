"""Logits that keep this rank's vocabulary shard, so that the model's own cross-entropy is computed from shards."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from fused_megatron.checks import InputError
from fused_megatron.collectives import Group, all_gather_split, group_size
from fused_megatron.modules import DeferredLogits, LogitsHead
from fused_megatron.modules.deferred_logits import RESHAPING, defer, keeps_columns, takes_rows
from fused_megatron.tensor_parallel import (
    column_parallel_linear,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)

# Elementwise functions of a tensor, or of a tensor and a number.
_ELEMENTWISE = {
    torch.tanh, torch.Tensor.tanh, torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__,
    torch.div, torch.Tensor.div, torch.Tensor.__truediv__, torch.Tensor.contiguous,
}  # fmt: skip
_SUMS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}
_CONVERTED = {torch.Tensor.float, torch.Tensor.to}
# Names of functions that are allowed on logits that are not gathered.
_ALLOWED_ON_SHARDS = {
    "__get__", "dim", "ndimension", "is_floating_point", "is_contiguous", "get_device", "is_complex",
    "__hash__", "__repr__",
}  # fmt: skip
_SIZES = (torch.Tensor.shape.__get__, torch.Tensor.size)  # type: ignore[attr-defined]


class LogitsScope:
    """Marks the model's forward: heads return VocabLogits inside of it, and the model returns plain tensors.

    Attributes:
        gather: gather the logits while gradients are recorded; without gradients they are always gathered.
        running: whether the model's forward runs now.
    """

    def __init__(self, gather: bool) -> None:
        self.gather = gather
        self.running = False

    def install(self, model: nn.Module) -> None:
        """Install hooks around the model's forward."""
        model.register_forward_pre_hook(self._enter)
        model.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.running = True

    def _leave(self, module: nn.Module, args: Any, result: Any) -> Any:
        self.running = False
        if torch.compiler.is_compiling():  # a compiled forward has plain tensors throughout
            return None
        return _without_shards(result)


def _without_shards(result: Any) -> Any:
    """Return the model's result with plain tensors; a dict stays the same object."""
    if isinstance(result, VocabLogits):
        return result.plain
    if isinstance(result, dict):  # also transformers' ModelOutput, which sets its attributes with its entries
        for key, value in list(result.items()):
            if isinstance(value, VocabLogits):
                result[key] = value.plain
        return result
    if type(result) in (tuple, list) and any(isinstance(value, VocabLogits) for value in result):
        return type(result)(_without_shards(value) for value in result)
    return result


class VocabLogits(torch.Tensor):
    """Logits [..., V] that also keep this rank's columns [..., ceil(V / R)].

    They behave like the plain tensor. Operations that keep the columns (selecting rows, conversion, scaling, a soft
    cap) run on the shard too. F.cross_entropy uses the shard: no float32 copy and no softmax of the full logits. A hook
    gets the gradient of the shard.

    Attributes:
        plain: the logits as a torch.Tensor [..., V]; if they are not gathered, the shard.
        shard: this rank's columns; columns from V on are padding.
        vocab_size: V.
        tp_group: the tensor-parallel ranks.
        loss_dtype: dtype of the loss that torch would compute from these logits.
    """

    plain: torch.Tensor
    shard: torch.Tensor
    vocab_size: int
    tp_group: Group
    loss_dtype: torch.dtype

    @property
    def gathered(self) -> bool:
        """Whether the full logits are there."""
        return self.plain is not self.shard

    @property
    def meta_full(self) -> torch.Tensor:
        """A tensor on the meta device with the shape of the full logits."""
        return torch.empty((*self.plain.shape[:-1], self.vocab_size), device="meta")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run func on the shard too, if it keeps the columns; else run it on the plain tensor."""
        kwargs = kwargs or {}
        if func is torch.Tensor.register_hook:
            # The loss may use the full logits or the shard. Its gradient reaches the shard either way.
            return args[0].shard.register_hook(*args[1:], **kwargs)
        result = _loss(*args, **kwargs) if func is F.cross_entropy else _apply_to_shard(func, args, kwargs)
        if result is not None:
            return result
        logits = next((a for a in (*args, *kwargs.values()) if isinstance(a, VocabLogits)), None)
        if logits is not None and not logits.gathered:
            if func in _SIZES:
                return func(logits.meta_full, *args[1:], **kwargs)
            if func.__name__ in _ALLOWED_ON_SHARDS:
                logits = None
        if logits is not None and not logits.gathered:
            raise InputError(
                f"gather_logits=False: the model does {func.__name__} with its logits, for which they must be whole "
                "(gather_logits=True)"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))


class DeferredVocabLogits(VocabLogits):
    """VocabLogits that are not gathered, and whose shard is computed when it is read: it has no memory of its own."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute the shard for code that does not ask __torch_function__."""
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))


class ShardHead(LogitsHead):
    """A head whose weights are this rank's rows of the vocabulary."""

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tp_group: Group = None
    ) -> None:
        super().__init__(hidden, weight, bias)
        self._tp_group = tp_group

    def detached(self, hidden: torch.Tensor) -> "ShardHead":
        """Return the same head without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return ShardHead(hidden, self.weight.detach(), bias, self._tp_group)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute this rank's logits of hidden [..., H]: [..., ceil(V / R)]. Communication: one all-reduce of dx."""
        with self.as_then():
            return column_parallel_linear(hidden, self.weight, self.bias, tp_group=self._tp_group)


def deferred_vocab_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, vocab_size: int, tp_group: Group
) -> VocabLogits:
    """Make VocabLogits of hidden [..., H] whose shard is computed when it is read, and never for the model's loss."""
    shard = defer(ShardHead(hidden, weight, bias, tp_group), hidden)
    return _make(shard, shard, vocab_size, tp_group, shard.dtype)


def vocab_logits(shard: torch.Tensor, vocab_size: int, tp_group: Group, gather: bool) -> VocabLogits:
    """Make VocabLogits from this rank's columns [..., ceil(V / R)].

    Communication: one all-gather of the logits if `gather`, else none.
    """
    plain = all_gather_split(shard, -1, tp_group)[..., :vocab_size] if gather else shard
    return _make(plain, shard, vocab_size, tp_group, shard.dtype)


def _make(
    plain: torch.Tensor, shard: torch.Tensor, vocab_size: int, tp_group: Group, dtype: torch.dtype
) -> VocabLogits:
    logits: Any
    if isinstance(plain, DeferredLogits):
        logits = torch.Tensor._make_wrapper_subclass(
            DeferredVocabLogits, plain.shape, dtype=plain.dtype, device=plain.device
        )
    else:
        with torch._C.DisableTorchFunctionSubclass():
            logits = plain.as_subclass(VocabLogits)
    logits.plain = plain
    logits.shard = shard
    logits.loss_dtype = dtype
    logits.vocab_size = vocab_size
    logits.tp_group = tp_group
    return logits


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, VocabLogits) else value


def _apply_to_shard(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> VocabLogits | None:
    """Apply func to the logits and to their shard; None if func may not keep the columns."""
    logits = args[0] if args else None
    if not isinstance(logits, VocabLogits):
        return None
    dtype = logits.loss_dtype
    step: Callable[[torch.Tensor], torch.Tensor]
    if func in _SUMS and not kwargs and len(args) == 2 and isinstance(args[1], VocabLogits):
        return _sum(logits, args[1])
    if func in RESHAPING:
        shape = tuple(func(logits.meta_full, *args[1:], **kwargs).shape)
        if not shape or shape[-1] != logits.vocab_size:
            return None
        step = lambda x: x.reshape(*shape[:-1], x.shape[-1])  # noqa: E731
    elif func is torch.Tensor.__getitem__ and keeps_columns(logits.dim(), args[1]):
        step = lambda x: x[args[1]]  # noqa: E731
    elif func in _ELEMENTWISE and not kwargs and all(isinstance(other, int | float) for other in args[1:]):
        step = lambda x: func(x, *args[1:])  # noqa: E731
    elif func in _CONVERTED and not kwargs and (len(args) == 1 or isinstance(args[1], torch.dtype)):
        dtype = args[1] if len(args) > 1 else torch.float32
        # The loss computes in float32 anyway, so it needs no float32 copy of the shard.
        shard = logits.shard if dtype == torch.float32 else logits.shard.to(dtype)
        plain = logits.plain.to(dtype) if logits.gathered else shard
        return _make(plain, shard, logits.vocab_size, logits.tp_group, dtype)
    else:
        return None
    shard = step(logits.shard)
    plain = step(logits.plain) if logits.gathered else shard
    return _make(plain, shard, logits.vocab_size, logits.tp_group, dtype)


def _sum(a: VocabLogits, b: VocabLogits) -> VocabLogits | None:
    """Add the logits of two heads, of a layer and of its adapter; None if they differ in their form."""
    if a.gathered != b.gathered or a.meta_full.shape != b.meta_full.shape:
        return None
    shard = a.shard + b.shard
    plain = a.plain + b.plain if a.gathered else shard
    return _make(plain, shard, a.vocab_size, a.tp_group, torch.promote_types(a.loss_dtype, b.loss_dtype))


def _loss(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor | None:
    """Compute torch.nn.functional.cross_entropy of logits [T, V] from shards; None for arguments without support."""
    if not isinstance(input, VocabLogits) or not takes_rows(input, target, weight, size_average, reduce):
        return None
    if reduction not in ("none", "mean", "sum"):
        return None
    shard = input.shard
    options: dict[str, Any] = {
        "tp_group": input.tp_group,
        "vocab_size": input.vocab_size,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "padded_vocab_size": shard.shape[-1] * group_size(input.tp_group),
    }
    if isinstance(shard, DeferredLogits) and not shard.was_written():
        options |= {"bias_shard": shard.head.bias, "softcap": shard.softcap}
        options["reduction"] = "none" if reduction == "none" else "sum"
        with shard.head.as_then():
            loss = vocab_parallel_linear_cross_entropy(shard.scaled_hidden(), shard.head.weight, target, **options)
    else:
        loss = vocab_parallel_cross_entropy(getattr(shard, "plain", shard), target, **options)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (target != ignore_index).sum()
    return loss.to(input.loss_dtype)

"""Logits that are computed when they are read, so that a model's own cross-entropy never holds all of them."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from fused_megatron import ops
from fused_megatron.ops.product import product

# Functions that reshape rows and keep the vocabulary as the last dim.
RESHAPING = {torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.flatten, torch.flatten}
_SCALING = {
    **dict.fromkeys((torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__), 1),
    **dict.fromkeys((torch.div, torch.Tensor.div, torch.Tensor.__truediv__), -1),
}
"""Products and quotients with a number, and the power of the number."""
_TANH = {torch.tanh, torch.Tensor.tanh}
_CONVERTED = {torch.Tensor.float, torch.Tensor.to}
# What a tensor says without its values.
_ATTRIBUTES = ["shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu", "is_meta", "is_sparse"]
_ATTRIBUTES += ["is_quantized", "is_leaf", "itemsize", "nbytes"]
_METHODS = ["size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "get_device"]
_METHODS += ["element_size", "__len__", "__hash__"]
_METADATA = {getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES}
_METADATA |= {getattr(torch.Tensor, name) for name in _METHODS}


class LogitsHead:
    """A linear head as it was when its logits were asked for: its weights, and the settings of autocast.

    Attributes:
        weight: [V, H].
        bias: [V] or None.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self._device = hidden.device.type
        self._autocast = torch.is_autocast_enabled(self._device)
        self._autocast_dtype = torch.get_autocast_dtype(self._device)
        self._versions = [(one, one._version) for one in (hidden, weight, bias) if one is not None]

    @property
    def vocab_size(self) -> int:
        """V, the number of columns of the logits."""
        return self.weight.shape[0]

    def dtype(self, hidden: torch.Tensor) -> torch.dtype:
        """Return the dtype of the logits."""
        return self._autocast_dtype if self._autocast and hidden.dtype != torch.float64 else hidden.dtype

    def detached(self, hidden: torch.Tensor) -> "LogitsHead":
        """Return the same head without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return type(self)(hidden, self.weight.detach(), bias)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the logits of hidden [..., H]: [..., V]."""
        with self.as_then():
            return product(hidden, self.weight, self.bias)

    def loss(self, hidden: torch.Tensor, target: torch.Tensor, softcap: float | None, **options: Any) -> torch.Tensor:
        """Compute the cross-entropy of hidden [T, H] for target [T] int64 without all logits."""
        with self.as_then():
            return ops.linear_cross_entropy(hidden, self.weight, target, bias=self.bias, softcap=softcap, **options)

    @contextmanager
    def as_then(self) -> Iterator[None]:
        """Set autocast as it was. Raises RuntimeError if the weights have changed since the model ran."""
        if any(one._version != version for one, version in self._versions):
            raise RuntimeError(
                "logits of a fused head are computed when they are read, and its weight has changed since the model "
                "ran (read them before optimizer.step(), or run the model again)"
            )
        with torch.autocast(self._device, self._autocast_dtype, enabled=self._autocast):
            yield


class DeferredLogits(torch.Tensor):
    """Logits [..., V] of a head that are computed when they are read, and then behave like any tensor.

    F.cross_entropy of them runs on tiles (ops.linear_cross_entropy), also after a selection of rows, a conversion, a
    scale or a soft cap. Every other function gets the logits themselves, with their gradient.

    Attributes:
        head: the head.
        hidden: [..., H]; the head's input, of the selected rows.
        scale, softcap: the logits are softcap * tanh(scale / softcap * hidden @ weight.T), or scale * hidden @
            weight.T.
        make: computes the logits as PyTorch would.
        source: the logits from which these were selected or converted; None for a head's own.
    """

    head: LogitsHead
    hidden: torch.Tensor
    scale: float
    softcap: float | None
    make: Callable[[], torch.Tensor]
    source: "DeferredLogits | None"
    _plain: torch.Tensor | None
    _made_version: int
    _hooks: OrderedDict[int, Callable[[torch.Tensor], Any]]

    @property
    def plain(self) -> torch.Tensor:
        """The logits as a torch.Tensor; computed once."""
        made = self._plain
        stale = made is not None and torch.is_grad_enabled() and not made.requires_grad and self._records()
        if made is None or (stale and made._version == self._made_version):
            made = self._plain = self.make()
            self._made_version = made._version
            for hook in self._hooks.values() if made.requires_grad else ():
                made.register_hook(hook)
        return made

    @property
    def is_computed(self) -> bool:
        """Whether the logits themselves were read."""
        return self._plain is not None

    def _records(self) -> bool:
        leaves = (self.hidden, self.head.weight, self.head.bias)
        return any(one is not None and one.requires_grad for one in leaves)

    def was_written(self) -> bool:
        """Whether something wrote into the logits: the loss is then another function of the head."""
        one: DeferredLogits | None = self
        while one is not None:
            if one._plain is not None and one._plain._version != one._made_version:
                return True
            one = one.source
        return False

    def _keep_hook(self, hook: Callable[[torch.Tensor], Any]) -> RemovableHandle:
        """Keep a hook for the gradient of the logits, which exists only if something reads them (FSDP2 adds hooks)."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def scaled_hidden(self) -> torch.Tensor:
        """Return hidden times the scale: it has far fewer numbers than the logits."""
        return self.hidden if self.scale == 1.0 else self.hidden * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer without the logits where that is possible; else compute them."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **kwargs)
            if func == torch.Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
                return args[0]._records()
            if func is torch.Tensor.register_hook and args[0]._plain is None:
                return args[0]._keep_hook(*args[1:], **kwargs)
            result = loss_of(*args, **kwargs) if func is F.cross_entropy else _recorded(func, args, kwargs)
            return func(*tree_map(_read, args), **tree_map(_read, kwargs)) if result is None else result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute the logits for code that does not ask __torch_function__, such as a hook in C++."""
        return func(*tree_map(_read, args), **tree_map(_read, kwargs or {}))


def defer(head: LogitsHead, hidden: torch.Tensor) -> DeferredLogits:
    """Return the logits of hidden [..., H]: [..., V], not computed yet."""
    shape = (*hidden.shape[:-1], head.vocab_size)
    return _make(head, hidden, shape, head.dtype(hidden), lambda: head.logits(hidden))


def _make(
    head: LogitsHead,
    hidden: torch.Tensor,
    shape: Any,
    dtype: torch.dtype,
    make: Callable[[], torch.Tensor],
    source: DeferredLogits | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> DeferredLogits:
    logits: Any = torch.Tensor._make_wrapper_subclass(DeferredLogits, shape, dtype=dtype, device=hidden.device)
    logits.head, logits.hidden, logits.make, logits.source = head, hidden, make, source
    logits.scale, logits.softcap, logits._plain, logits._made_version, logits._hooks = (
        scale,
        softcap,
        None,
        0,
        OrderedDict(),
    )
    return logits


def _read(value: Any) -> Any:
    return value.plain if isinstance(value, DeferredLogits) else value


def _recorded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DeferredLogits | None:
    """Return func of the logits, not computed; None if func needs the logits themselves."""
    logits = args[0] if args else None
    if not isinstance(logits, DeferredLogits):
        return None
    head, hidden, dtype, scale, cap = logits.head, logits.hidden, logits.dtype, logits.scale, logits.softcap
    rest = args[1:]
    if func in RESHAPING:
        shape = tuple(func(torch.empty(logits.shape, device="meta"), *rest, **kwargs).shape)
        if not shape or shape[-1] != head.vocab_size:
            return None
        hidden = hidden.reshape(*shape[:-1], hidden.shape[-1])
    elif func is torch.Tensor.__getitem__ and keeps_columns(logits.dim(), rest[0]):
        hidden = hidden[rest[0]]
    elif func in _SCALING and not kwargs and len(rest) == 1 and isinstance(rest[0], int | float) and rest[0] > 0:
        factor = rest[0] ** _SCALING[func]
        scale *= factor
        cap = None if cap is None else cap * factor
    elif func in _TANH and not kwargs and cap is None:
        cap = 1.0
    elif func in _CONVERTED and not kwargs and (not rest or (len(rest) == 1 and isinstance(rest[0], torch.dtype))):
        dtype = rest[0] if rest else torch.float32
    elif func is torch.Tensor.contiguous and not kwargs:
        pass
    elif func is torch.Tensor.detach:
        hidden, rest = hidden.detach(), ()
        head = head.detached(hidden)
    else:
        return None
    shape = (*hidden.shape[:-1], head.vocab_size)
    return _make(head, hidden, shape, dtype, lambda: func(logits.plain, *rest, **kwargs), logits, scale, cap)


def keeps_columns(dims: int, index: Any) -> bool:
    """Return whether an index selects only rows."""
    parts = index if isinstance(index, tuple) else (index,)
    if parts[-1] is Ellipsis or not all(part is Ellipsis or isinstance(part, int | slice) for part in parts):
        return False
    reaches_last = Ellipsis in parts or len(parts) >= dims
    return not reaches_last or parts[-1] == slice(None)


def takes_rows(input: Any, target: Any, weight: Any, size_average: Any, reduce: Any) -> bool:
    """Return whether a call of cross_entropy has rows of logits, a token id for each, and no weights of classes.

    Args: as torch.nn.functional.cross_entropy; input is a stand-in for logits, and target is none of its kind.
    """
    if isinstance(target, type(input)) or input.dim() != 2 or not (weight is size_average is reduce is None):
        return False
    return target.dtype == torch.int64 and target.dim() == 1 and target.shape[0] == input.shape[0]


def loss_of(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor | None:
    """Compute torch.nn.functional.cross_entropy of logits [T, V] from tiles; None for arguments without support."""
    if not isinstance(input, DeferredLogits) or not takes_rows(input, target, weight, size_average, reduce):
        return None
    if target.device != input.device or input.was_written():
        return None
    return input.head.loss(
        input.scaled_hidden(),
        target,
        input.softcap,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        dtype=torch.promote_types(input.dtype, torch.float32) if _widens(input) else input.dtype,
    )


def _widens(logits: DeferredLogits) -> bool:
    """Whether torch would compute this loss under autocast, which returns float32."""
    return torch.is_autocast_enabled(logits.device.type)

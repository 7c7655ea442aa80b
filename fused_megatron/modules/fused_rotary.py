"""The fused rotary embedding for attention modules that a model defines in a class of its own."""

import builtins
import inspect
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fused_megatron import ops

_NAMES = ("q", "k", "cos", "sin")
# Sizes of the comparison: batch, heads of q and of k, sequence, head.
_BATCH, _HEADS, _KV_HEADS, _SEQUENCE, _HEAD = 2, 3, 1, 4, 6


class FusedRotary:
    """Mixed into the class of an attention module: its forward runs as before, with the fused rotary embedding.

    Only the global function that rotates queries and keys is another for this forward; the model's source file, and
    other models of the same class, do not change. Under torch.compile the model's own function runs.

    Attributes:
        unfused: the module's own class.
    """

    unfused: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle and deepcopy make it again from the model's own.
        return _restored, (self.unfused,), self.__dict__


def _restored(unfused: type[nn.Module]) -> nn.Module:
    kind = fused_class(unfused)  # type: ignore[arg-type]
    assert kind is not None
    return kind.__new__(kind)


@lru_cache(maxsize=64)
def fused_class(unfused: type[nn.Module]) -> type[nn.Module] | None:
    """Return the class whose forward has the fused rotary embedding; None if the forward calls no such function.

    The function's name does not matter: each global function of the forward with the arguments (q, k, cos, sin) is
    compared with the fused op.
    """
    forward = unfused.forward
    functions = {name: found for name, found in _globals_of(forward).items() if _takes_tables(found)}
    fused = {name: _fused(found) for name, found in functions.items() if rotates(found)}
    rebound = _rebound(forward, fused) if fused else None
    if rebound is None:
        return None
    attributes = {"forward": rebound, "unfused": unfused, "__module__": unfused.__module__}
    return type(unfused.__name__, (FusedRotary, unfused), {**attributes, "__qualname__": unfused.__qualname__})


def calls_a_rotary_function(kind: type[nn.Module]) -> bool:
    """Return whether the forward of a class calls a global function with the arguments (q, k, cos, sin)."""
    return any(map(_takes_tables, _globals_of(kind.forward).values()))


def halves_are_equal(module: nn.Module) -> bool | None:
    """Return whether a module that makes cos and sin repeats each angle in both halves; None if it makes no tables.

    The model's own function multiplies each half by its own columns, the fused op both by the columns of the first.
    """
    buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    if "inv_freq" not in buffers or module._parameters or module._modules:
        return None
    try:
        twin = type(module).__new__(type(module))
        twin.__dict__ = {**module.__dict__, **{k: v for k, v in nn.Module().__dict__.items() if "hook" in k}}
        count = buffers["inv_freq"].numel()
        angles = torch.linspace(1, 2, count, device="cpu")
        twin.__dict__["_buffers"] = {name: angles.clone() for name in buffers}
        x = torch.zeros(1, _SEQUENCE, 2 * count, device="cpu")
        with torch.no_grad():
            tables = twin(x, torch.arange(_SEQUENCE, device="cpu")[None])
        return all(
            table.shape[:2] == (1, _SEQUENCE) and torch.equal(*table.chunk(2, -1)) for table in tables
        ) and not torch.equal(*tables)
    except Exception:  # a foreign forward may raise anything: its tables are not known
        return False


def _inner(function: Any) -> Any:
    """Return the function that a decorator wraps, if it is in the closure; else None."""
    wrapped = getattr(function, "__wrapped__", None)
    cells = getattr(function, "__closure__", None) or ()
    return wrapped if wrapped is not None and any(_content(cell) is wrapped for cell in cells) else None


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _globals_of(function: Any) -> dict[str, Any]:
    """Return the global functions that a function names, below its decorators."""
    while (inner := _inner(function)) is not None:
        function = inner
    if not isinstance(function, types.FunctionType):
        return {}
    names = function.__code__.co_names
    return {n: function.__globals__[n] for n in names if n in function.__globals__ and not hasattr(builtins, n)}


def _rebound(function: Any, replaced: dict[str, Callable[..., Any]]) -> Any:
    """Return a copy of a function, and of its decorators, in which global names are bound to other functions."""
    if not isinstance(function, types.FunctionType):
        return None
    inner = _inner(function)
    closure, scope = function.__closure__, function.__globals__
    if inner is None:
        # Without a module's name: torch.compile would look the functions up in that module.
        scope = {name: value for name, value in {**scope, **replaced}.items() if name != "__name__"}
    else:
        copied = _rebound(inner, replaced)
        if copied is None:
            return None
        closure = tuple(types.CellType(copied) if _content(c) is inner else c for c in closure or ())
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    copy.__qualname__, copy.__doc__, copy.__module__ = function.__qualname__, function.__doc__, function.__module__
    copy.__annotations__ = function.__annotations__
    if inner is not None:
        copy.__wrapped__ = copied  # type: ignore[attr-defined]
    return copy


def _takes_tables(found: Any) -> bool:
    if not callable(found) or isinstance(found, type):
        return False
    try:
        arguments = inspect.signature(found).parameters
    except (TypeError, ValueError):
        return False
    optional = all(one.default is not inspect.Parameter.empty for name, one in arguments.items() if name not in _NAMES)
    return tuple(arguments)[:4] == _NAMES and optional


def rotates(function: Callable[..., Any]) -> bool:
    """Return whether a function of (q, k, cos, sin) computes what the fused op computes, by its results."""
    generator = torch.Generator().manual_seed(0)
    heads = (_BATCH, _HEADS + _KV_HEADS, _SEQUENCE, _HEAD)
    try:
        for batch, rotated in ((1, _HEAD), (_BATCH, _HEAD), (1, _HEAD - 2)):
            both = torch.randn(heads, generator=generator, dtype=torch.float32, device="cpu")
            angles = torch.randn(batch, _SEQUENCE, rotated // 2, generator=generator, device="cpu").repeat(1, 1, 2)
            q, k = both.split([_HEADS, _KV_HEADS], 1)
            if rotated < _HEAD and not _agree(function, q[..., :rotated], k[..., :rotated], angles):
                return False
            if rotated == _HEAD and not _agree(function, q, k, angles):
                return False
    except Exception:  # a foreign function may raise anything: it is not replaced
        return False
    return True


def _agree(function: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor) -> bool:
    with torch.no_grad():
        own = function(q, k, angles.cos(), angles.sin())
        ours = _rotate(q, k, angles.cos(), angles.sin())
    return all(a.shape == b.shape and bool((a - b).abs().max() < 1e-5) for a, b in zip(own, ours, strict=True))


def _fused(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function to call instead of a model's own."""

    def fused_rotary_embedding(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Rotate q and k [B, N, S, D] by cos and sin [1 or B, S, Drot]; other arguments go to the model's own."""
        if torch.compiler.is_compiling() or not _fits(q, k, cos, sin, args, kwargs):
            return original(q, k, cos, sin, *args, **kwargs)
        return _rotate(q, k, cos, sin)

    return fused_rotary_embedding


def _fits(q: Any, k: Any, cos: Any, sin: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    if args or any(value is not None for name, value in kwargs.items() if (name, value) != ("unsqueeze_dim", 1)):
        return False
    if not all(type(one) is torch.Tensor for one in (q, k, cos, sin)) or q.dim() != 4 or cos.dim() != 3:
        return False
    same = q.dtype == k.dtype == torch.promote_types(q.dtype, cos.dtype) and cos.dtype == sin.dtype
    shapes = cos.shape == sin.shape and cos.shape[0] in (1, q.shape[0]) and cos.shape[1] == q.shape[2] == k.shape[2]
    return same and shapes and not cos.requires_grad and cos.shape[-1] == q.shape[-1] == k.shape[-1]


def _rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rotate q [B, N, S, D] and k [B, Nk, S, D] by cos and sin [1 or B, S, D]."""
    batch, seq_len, half = cos.shape[0], cos.shape[1], cos.shape[2] // 2
    positions = None
    if batch > 1:
        positions = torch.arange(batch * seq_len, device=cos.device).view(batch, seq_len)
    tables = (cos[..., :half].reshape(-1, half), sin[..., :half].reshape(-1, half))
    turned = ops.rotary_embedding(q.transpose(1, 2), k.transpose(1, 2), *tables, sequence_dim=1, positions=positions)
    return tuple(one.transpose(1, 2) for one in turned if one is not None)

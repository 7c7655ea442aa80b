"""A forward of a model's copy on the meta device: shapes and the autograd graph, without values or memory."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


@dataclass
class MetaCall:
    """A call of a module on the meta device.

    Attributes:
        root: name of the module to call; "" for the whole model.
        arguments: its positional arguments.
        keywords: its keyword arguments.
        avoided: classes of modules that are not run: they return their first tensor.
        repeated: names of layers that are not run, and of the identical layer whose result they return.
    """

    root: str
    arguments: tuple[torch.Tensor, ...] = ()
    keywords: dict[str, torch.Tensor] = field(default_factory=dict)
    avoided: set[type[nn.Module]] = field(default_factory=set)
    repeated: Mapping[str, str] = field(default_factory=dict)


# Limit for the questions of a forward: beyond it, the forward is in a loop that only another answer would end.
_MOST_ANSWERS = 1000


class _FakeAnswers(TorchFunctionMode):
    """Answers questions about values that do not exist: True, and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _QUESTIONS and args[0].is_meta:
            self.answers += 1
            if self.answers > _MOST_ANSWERS:
                raise RuntimeError("it asks about numbers without end")
            return _QUESTIONS[func](1)
        return func(*args, **(kwargs or {}))


_QUESTIONS: dict[Any, Callable[[int], Any]] = {
    torch.Tensor.item: int,
    torch.Tensor.__bool__: bool,
    torch.Tensor.__int__: int,
    torch.Tensor.__float__: float,
    torch.Tensor.__index__: int,
    torch.Tensor.__contains__: lambda _: False,
}


class MetaRun:
    """One forward of a module on the meta device.

    Attributes:
        error: the exception that the forward raised; None if it succeeded.
        inside: names of the modules that were running at the error, the outermost first.
        around: by module, the names of the modules that were running when it ran, the outermost first.
        outputs: autograd nodes of the returned tensors.
        originals: for each parameter of the copy, its name in the model.
    """

    def __init__(self, model: nn.Module, call: MetaCall, change: Callable[[nn.Module], None] | None) -> None:
        self.error: Exception | None = None
        self.inside: list[str] = []
        self.around: dict[str, tuple[str, ...]] = {}
        self.outputs: list[Any] = []
        self.originals: dict[torch.Tensor, str] = {}
        try:
            twin = _meta_twin(model.get_submodule(call.root)).eval()
            self.originals = {p: joined(call.root, name) for name, p in twin.named_parameters()}
            if change is not None:
                change(twin)
            modules = {joined(call.root, name): module for name, module in twin.named_modules()}
            for name, module in modules.items():
                self._watch(name, module)
                if type(module) in call.avoided:
                    module.forward = _first_tensor
            if not call.root:
                _repeat(modules, call.repeated)
            arguments = [a.clone().requires_grad_(a.is_floating_point()) for a in call.arguments]
            # Some models draw random numbers even in evaluation: the fork keeps the caller's generator as it is. The
            # default device is not set to meta: a table that the model caches now would have no values later.
            with torch.random.fork_rng(devices=[]), torch.enable_grad(), _FakeAnswers():
                result = twin(*arguments, **call.keywords)
            tensors = tree_leaves(dict(result) if isinstance(result, dict) else result)
            self.outputs = [t.grad_fn for t in tensors if isinstance(t, torch.Tensor)]
        except Exception as error:  # the forward is not ours and may raise anything
            self.error = error

    def _watch(self, name: str, module: nn.Module) -> None:
        def enter(*_: Any) -> None:
            self.around[name] = tuple(self.inside)
            self.inside.append(name)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(lambda *_: self.inside.remove(name))

    @property
    def text(self) -> str:
        """The error in one line."""
        lines = str(self.error).strip().splitlines()
        return f"{type(self.error).__name__}: {lines[0]}" if lines else type(self.error).__name__


def _repeat(modules: dict[str, nn.Module], repeated: Mapping[str, str]) -> None:
    """Let each repeated layer return the result of its first identical layer."""
    returned: dict[str, Any] = {}
    for first in set(repeated.values()):
        modules[first].register_forward_hook(lambda _, __, result, first=first: returned.update({first: result}))
    for name, first in repeated.items():
        modules[name].forward = lambda *_, first=first, **__: returned[first]


def joined(root: str, name: str) -> str:
    """Return the full name of a module that is called `name` inside `root`."""
    return f"{root}.{name}".strip(".")


def name_inside(root: str, name: str) -> str | None:
    """Return the name relative to root; "" for root itself, None for a module outside of root."""
    if not root or name == root:
        return name.removeprefix(root)
    return name.removeprefix(f"{root}.") if name.startswith(f"{root}.") else None


def _meta_twin(model: nn.Module) -> nn.Module:
    """Return a deep copy with all tensors on the meta device and without hooks."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in module.__dict__.items():
            if "hook" in name and isinstance(value, dict):
                memo[id(value)] = type(value)()
        own = [*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()]
        for tensor in own:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = on_meta(tensor)
    twin = copy.deepcopy(model, memo)
    for config in {id(c): c for m in twin.modules() if (c := getattr(m, "config", None)) is not None}.values():
        # Attention kernels of other libraries need values; the eager implementation has the same shapes.
        if getattr(config, "_attn_implementation", "sdpa") not in ("sdpa", "eager", None):
            config._attn_implementation = "eager"
    return twin


def on_meta(tensor: torch.Tensor) -> Any:
    """Return a tensor or parameter of the same shape and dtype on the meta device."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.is_floating_point())
    return empty


def _first_tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Return the first tensor argument, in place of the result of a module that cannot run."""
    tensor: torch.Tensor = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
    return tensor

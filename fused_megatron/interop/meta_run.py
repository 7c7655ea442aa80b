"""A forward of a model's twin on the meta device: shapes and the graph of gradients, without numbers or memory."""

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
    """What to run.

    Attributes:
        root: the name of a part of the model.
        arguments, keywords: what it takes.
        avoided: classes of modules to go around.
        repeated: names of layers that return what another one returned, which is built the same.
    """

    root: str
    arguments: tuple[torch.Tensor, ...] = ()
    keywords: dict[str, torch.Tensor] = field(default_factory=dict)
    avoided: set[type[nn.Module]] = field(default_factory=set)
    repeated: Mapping[str, str] = field(default_factory=dict)


# A forward that asks more often loops until the answer is another one.
_MOST_ANSWERS = 1000


class _Affirmed(TorchFunctionMode):
    """Answers what a forward asks about numbers that are not there: yes, and 1."""

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
    """One forward of a part of a model, without numbers.

    Attributes:
        error: what it raised.
        inside: names of the modules that were running then, the outermost first.
        outputs: the nodes of the graph that made what it returned.
        originals: names of the model's parameters, by those of the twin.
    """

    def __init__(self, model: nn.Module, call: MetaCall, change: Callable[[nn.Module], None] | None) -> None:
        self.error: Exception | None = None
        self.inside: list[str] = []
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
            # What draws although it is in evaluation draws from a fork of the caller's generator. The default device
            # stays what it is: a table that a model keeps for later would have no numbers.
            with torch.random.fork_rng(devices=[]), torch.enable_grad(), _Affirmed():
                result = twin(*arguments, **call.keywords)
            tensors = tree_leaves(dict(result) if isinstance(result, dict) else result)
            self.outputs = [t.grad_fn for t in tensors if isinstance(t, torch.Tensor)]
        except Exception as error:  # whatever a stranger's forward raises
            self.error = error

    def _watch(self, name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: self.inside.append(name))
        module.register_forward_hook(lambda *_: self.inside.remove(name))

    @property
    def text(self) -> str:
        """Its error in a line."""
        lines = str(self.error).strip().splitlines()
        return f"{type(self.error).__name__}: {lines[0]}" if lines else type(self.error).__name__


def _repeat(modules: dict[str, nn.Module], repeated: Mapping[str, str]) -> None:
    """Let layers return what the first of their kind returned."""
    returned: dict[str, Any] = {}
    for first in set(repeated.values()):
        modules[first].register_forward_hook(lambda _, __, result, first=first: returned.update({first: result}))
    for name, first in repeated.items():
        modules[name].forward = lambda *_, first=first, **__: returned[first]


def joined(root: str, name: str) -> str:
    """The name of what has a name inside of a root."""
    return f"{root}.{name}".strip(".")


def name_inside(root: str, name: str) -> str | None:
    """The name as seen from a module around it; "" for that module itself, None for what is not in it."""
    if not root or name == root:
        return name.removeprefix(root)
    return name.removeprefix(f"{root}.") if name.startswith(f"{root}.") else None


def _meta_twin(model: nn.Module) -> nn.Module:
    """A deep copy with all tensors on the meta device, and without hooks."""
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
        # Kernels of other libraries run with numbers only; their shapes are those of the plain one.
        if getattr(config, "_attn_implementation", "sdpa") not in ("sdpa", "eager", None):
            config._attn_implementation = "eager"
    return twin


def on_meta(tensor: torch.Tensor) -> Any:
    """A tensor, or parameter, of the same shape and dtype on the meta device."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.is_floating_point())
    return empty


def _first_tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
    """What stands for the result of a module that cannot run."""
    tensor: torch.Tensor = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
    return tensor

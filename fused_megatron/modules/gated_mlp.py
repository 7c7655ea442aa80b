"""GatedMLP: the fused forward for MLPs with a gate (SwiGLU, GeGLU) that a model defines in a class of its own."""

import inspect
import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fused_megatron import ops
from fused_megatron.modules.gelu import GELU
from fused_megatron.ops.joint_linear import joint_linear

# Activations of the gate that have a fused kernel, by the name that GatedMLP keeps.
_ACTIVATIONS = ("silu", "gelu, tanh", "gelu")
# Sizes of the comparison: any two that differ, and rows enough to meet both signs of the gate.
_WIDTH, _FEATURES, _ROWS = 5, 7, 6
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class GatedMLP(nn.Module):
    """Mixed into the class of MLPs such as LlamaMLP and Phi3MLP: y = down(activation(gate(x)) * up(x)).

    Never constructed: replace_modules changes the class of a module in place, which keeps its linears, hooks, names and
    state_dict. Gate and up are computed side by side, so that one kernel reads both: by one product where their weights
    follow each other in memory, as replace_modules lays them, else by two. The module's own forward runs if a linear is
    more than a product (LoRA, hooks), if the activation was replaced since, and under torch.compile, which fuses it.

    Attributes:
        gated_linears: names of (gate, up, down); of (gate and up in one, down).
        gated_activation: name of the gate's activation.
        gated_others: classes of the other modules, by name.
        unfused: the module's own class.

    Communication: none of its own.
    Memory: the input, gate and up, and the input of down are saved; eager PyTorch also saves activation(gate).
    Numerics: as torch.nn.functional.linear, and fused_megatron.ops.bias_swiglu and bias_geglu.
    """

    gated_linears: tuple[str, ...]
    gated_activation: str
    gated_others: dict[str, type[nn.Module]]
    unfused: type[nn.Module]

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Map the input [..., H], the only argument, to [..., H]."""
        (x,) = (*args, *kwargs.values())
        *entering, down = (self._modules[name] for name in self.gated_linears)
        joint = None
        if not torch.compiler.is_compiling() and x.dtype != torch.float64 and self._is_as_found():
            joint = _joint(entering, x)
        if joint is None:
            return self.unfused.forward(self, *args, **kwargs)
        return down(self._activate(*joint))  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle and deepcopy make it again from the module's own.
        return _restored, (self.unfused,), self.__dict__

    def _is_as_found(self) -> bool:
        """Whether the modules beside the linears are the same as when the module was compared."""
        others = {name: one for name, one in self._modules.items() if name not in self.gated_linears}
        return (
            others.keys() == self.gated_others.keys()
            and all(
                type(one) is self.gated_others[name] or self._is_the_fused_activation(one)
                for name, one in others.items()
            )
            and not any(getattr(one, hooks) for one in others.values() if one is not None for hooks in _HOOKS)
        )

    def _is_the_fused_activation(self, module: nn.Module | None) -> bool:
        return isinstance(module, GELU) and self.gated_activation == (
            "gelu" if module.approximate == "none" else "gelu, tanh"
        )

    def _activate(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.gated_activation == "silu":
            return ops.bias_swiglu(x, bias)
        return ops.bias_geglu(x, bias, "none" if self.gated_activation == "gelu" else "tanh")


@lru_cache(maxsize=64)
def gated_class(unfused: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a fused MLP whose own class is `unfused`, with all its other attributes and methods."""
    return type("GatedMLP", (GatedMLP, unfused), {"unfused": unfused, "__module__": unfused.__module__})


def _restored(unfused: type[nn.Module]) -> nn.Module:
    kind = gated_class(unfused)  # type: ignore[arg-type]
    return kind.__new__(kind)


def _joint(linears: list[Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return gate and up side by side [..., 2F], and their biases; None if a linear is more than a product."""
    if not all(is_bare(linear) for linear in linears):
        return None
    # Linears of parallel layers say what they multiply: their input may be gathered, or summed in backward.
    operands = [(x, one.weight, one.bias) if type(one) is nn.Linear else one.local_operands(x) for one in linears]
    inputs, weights, biases = zip(*operands, strict=True)
    if any(type(weight) is not nn.Parameter for weight in weights) or any(one is not inputs[0] for one in inputs):
        return None
    if len({x.dtype, *(weight.dtype for weight in weights)}) > 1 and not torch.is_autocast_enabled(x.device.type):
        return None
    if any(bias is not None for bias in biases) and any(bias is None for bias in biases):
        return None
    bias = None if biases[0] is None else biases[0] if len(biases) == 1 else torch.cat(biases)
    return joint_linear(inputs[0], weights), bias


def is_bare(linear: Any) -> bool:
    """Return whether a linear is only a product with its weight: no subclass, hook or replaced forward."""
    plain = type(linear) is nn.Linear or getattr(linear, "has_local_operands", False)
    return plain and "forward" not in linear.__dict__ and not any(getattr(linear, hooks) for hooks in _HOOKS)


def gating(module: nn.Module) -> dict[str, Any] | str | None:
    """Return the attributes with which GatedMLP computes the same as the module; why there are none; None for others.

    The class name does not matter: a copy of the module with small random linears runs forward and backward, and its
    results are compared with GatedMLP's.
    """
    linears = {name: child for name, child in module._modules.items() if type(child) is nn.Linear}
    others = [child for name, child in module._modules.items() if name not in linears]
    if not 2 <= len(linears) <= 3 or module._parameters or not any(True for _ in _roles(linears)):
        return None
    if len(linears) == 2 and not others:  # any two linears that fit: nothing says that there is a gate
        return None
    if module._buffers or any(next(other.parameters(), None) is not None for other in others if other is not None):
        return "has parameters, buffers or modules beside its linears"
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    if len(arguments) != 1:
        # Three equal squares are rather query, key and value.
        square = len({size for linear in linears.values() for size in linear.weight.shape}) == 1
        return None if square else f"its forward takes more than x: {', '.join(arguments)}"
    error = ""
    for roles in _roles(linears):
        for activation in _ACTIVATIONS:
            attributes = {
                "gated_linears": roles,
                "gated_activation": activation,
                "gated_others": {n: type(one) for n, one in module._modules.items() if n not in linears},
            }
            try:
                if _agrees(module, attributes, linears):
                    return attributes
            except Exception as caught:  # a foreign forward may raise anything: the module is not replaced
                error = error or f"; its forward could not be tried: {type(caught).__name__}: {caught}"
    return f"its result is not down(activation(gate(x)) * up(x)) with one of: {', '.join(_ACTIVATIONS)}{error}"


def _roles(linears: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the names of (gate, up, down), or of (gate and up, down), in every order that fits the shapes."""
    for names in itertools.permutations(linears):
        *entering, (outputs, inputs) = (tuple(linears[name].weight.shape) for name in names)
        if all(shape == (inputs * (3 - len(entering)), outputs) for shape in entering):
            yield names


def _agrees(module: nn.Module, attributes: dict[str, Any], linears: dict[str, Any]) -> bool:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 2 * torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    *entering, down = attributes["gated_linears"]
    small: dict[str, Any] = {}
    for name in (*entering, down):
        outputs = _WIDTH if name == down else _FEATURES * (3 - len(entering))
        linear: Any = nn.Linear(1, 1, bias=False)
        linear.weight = nn.Parameter(draw(outputs, _FEATURES if name == down else _WIDTH))
        if linears[name].bias is not None:
            linear.bias = nn.Parameter(draw(outputs))
        small[name] = linear
    x, upstream = draw(_ROWS, _WIDTH), draw(_ROWS, _WIDTH)
    results = []
    own: Any = type(module)
    for kind, more in ((own, {}), (gated_class(own), attributes)):
        twin = kind.__new__(kind)
        twin.__dict__ = {**module.__dict__, **{k: v for k, v in nn.Module().__dict__.items() if "hook" in k}, **more}
        twin.__dict__["_modules"] = {**module._modules, **small}
        leaves = [x.clone().requires_grad_(), *(p for linear in small.values() for p in linear.parameters())]
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            y = twin(leaves[0])
            results.append([y.detach(), *torch.autograd.grad(y, leaves, upstream)])
    # Both sides sum few float32 terms; two forms of GELU differ by 5e-4.
    pairs = zip(*results, strict=True)
    return all(a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * b.abs().max()) for a, b in pairs)


def lay_together(module: nn.Module, names: tuple[str, ...]) -> None:
    """Lay the weights of gate and up one after the other in memory, so that one product serves both.

    The parameters stay the same objects, with the same values. Weights stay where they are if they differ in dtype,
    device or requires_grad, or share their memory.
    """
    weights: list[Any] = [module.get_submodule(name).weight for name in names[:-1]]
    first = weights[0]
    if len(weights) != 2 or any(type(w) is not nn.Parameter or w.is_meta or w.is_inference() for w in weights):
        return
    if any((w.dtype, w.device) != (first.dtype, first.device) for w in weights):
        return
    # A weight that fills its storage shares it with no other tensor of the model, except by a tie.
    if any(w.untyped_storage().nbytes() != w.numel() * w.element_size() for w in weights):
        return
    with torch.no_grad():
        together = torch.cat([weight.detach() for weight in weights])
    for weight, rows in zip(weights, together.split([len(weight) for weight in weights]), strict=True):
        weight.data = rows

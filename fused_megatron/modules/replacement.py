"""replace_modules: replacement of a model's layers by fused ones that compute the same, in place."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fused_megatron.modules.adopted_rms_norm import EPS_NAMES, AdoptedRMSNorm, adoption
from fused_megatron.modules.cross_entropy import CrossEntropyLoss
from fused_megatron.modules.fused_head import FusedHead, head_of, loss_obstacle
from fused_megatron.modules.fused_rotary import FusedRotary, calls_a_rotary_function, fused_class, halves_are_equal
from fused_megatron.modules.gated_mlp import GatedMLP, gated_class, gating, lay_together
from fused_megatron.modules.gelu import GELU, gelu_of
from fused_megatron.modules.layer_norm import LayerNorm
from fused_megatron.modules.rms_norm import RMSNorm

DROP_INS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.CrossEntropyLoss: CrossEntropyLoss,
    nn.GELU: GELU,
}
FUSED = (*DROP_INS.values(), AdoptedRMSNorm, GatedMLP, FusedHead, FusedRotary)
_WRAPPED = "its forward was replaced or compiled (replace modules first)"


@dataclass(frozen=True)
class Replaced:
    """A replaced module: its name in the model (all names if it is shared), its old class and its new class."""

    name: str
    was: str
    now: str


@dataclass(frozen=True)
class Left:
    """A module that was not replaced, and the reason."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class ReplacementReport:
    """Result of replace_modules; print it for a summary.

    Attributes:
        replaced: the replaced modules, in the order of the model.
        left: modules that resemble a fused module but were not replaced, and the reason.
        without_drop_in: number of modules of every other class that has no submodules.
    """

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]
    without_drop_in: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} modules"]
        lines += [f"  {one.name}: {one.was} -> {one.now}" for one in self.replaced]
        lines += [f"left {len(self.left)} modules"] * bool(self.left)
        lines += [f"  {one.name} ({one.kind}): {one.reason}" for one in self.left]
        others = ", ".join(f"{count} {kind}" for kind, count in self.without_drop_in.items())
        return "\n".join([*lines, *([f"no drop-in for: {others}"] if others else [])])


@dataclass(frozen=True)
class Exchange:
    """A planned change of a module's class in place, which keeps its parameters, hooks and names."""

    name: str
    module: nn.Module
    drop_in: type[nn.Module]
    attributes: dict[str, Any]

    def make(self) -> Callable[[], None]:
        """Exchange the class; return a function that undoes it."""
        module = self.module
        was = type(self.module)
        before = dict(self.module.__dict__)

        def undo() -> None:
            module.__class__ = was
            module.__dict__.clear()
            module.__dict__.update(before)

        module.__class__ = self.drop_in
        module.__dict__.update(self.attributes)
        return undo

    def described(self) -> Replaced:
        """Return the entry for the report; call it before the exchange."""
        more = " with fused rotary embedding" if issubclass(self.drop_in, FusedRotary) else ""
        return Replaced(self.name, type(self.module).__name__, self.drop_in.__name__ + more)


def replace_modules(model: nn.Module) -> ReplacementReport:
    """Replace layers of a model by fused ones that compute the same, in place: Liger-Kernel's one line, on any device.

    - torch.nn's LayerNorm, RMSNorm, CrossEntropyLoss and GELU, and RMS norms and GELUs that a model defines itself
      (such as LlamaRMSNorm, Gemma's norm with a zero-centred weight, GPT-2's NewGELUActivation);
    - MLPs with a gate, SwiGLU and GeGLU (LlamaMLP, GemmaMLP, Phi3MLP): modules.GatedMLP;
    - the rotary embedding of attention modules that call a global function of (q, k, cos, sin), as in transformers;
    - the head: the cross-entropy of its logits, in the model's own loss or in the training loop, runs on tiles without
      all logits (modules.FusedHead). Whatever else reads the logits gets them, computed at that moment.

    All but torch.nn's are recognised by their results, not by their name: a copy, with small random weights if it has
    any, runs and is compared.

    Only the class of a module changes. Parameters stay the same objects, so that optimizers keep them (the weights of
    gate and up are moved next to each other); hooks, names, state_dict, device, dtype, training flag and shared modules
    do not change either. Subclasses of torch.nn's modules are not replaced, since they may override anything.

    Args:
        model: any module, on any device, also meta.

    Returns:
        The modules that were replaced, and those that were not, with reasons.

    Raises:
        TypeError: model is not a torch.nn.Module. After any error the model is unchanged.

    Memory: gate and up of one MLP at a time twice; afterwards nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__} must be a torch.nn.Module")
    found = find_exchanges(model)
    exchanges = [one for one in found.values() if isinstance(one, Exchange)]
    left, others = [], Counter[str]()
    for name, module in named_once(model):
        reason = found.get(module)
        if isinstance(reason, str):
            left.append(Left(name, type(module).__name__, reason))
        elif reason is None and not isinstance(module, FUSED) and next(module.children(), None) is None:
            others[type(module).__name__] += 1
    if any(exchange.drop_in is FusedHead for exchange in exchanges) and (obstacle := loss_obstacle(model)):
        left.append(Left("loss_function", type(model).__name__, obstacle))
    replaced = tuple(exchange.described() for exchange in exchanges)
    exchange_all(exchanges)
    for exchange in exchanges:
        if issubclass(exchange.drop_in, GatedMLP):
            lay_together(exchange.module, exchange.attributes["gated_linears"])
    return ReplacementReport(replaced, tuple(left), dict(others))


def find_exchanges(model: nn.Module) -> dict[nn.Module, Exchange | str]:
    """Return the exchange of every module that can be fused, and the reason for those that only resemble one."""
    tables = [equal for module in model.modules() if (equal := halves_are_equal(module)) is not None]
    head, head_reason = head_of(model) or (None, None)
    found: dict[nn.Module, Exchange | str] = {}
    for name, module in named_once(model):
        one = _find_head(name, module) if module is head else find_exchange(name, module)
        if one is None and calls_a_rotary_function(type(module)):
            one = _find_rotary(name, module, tables)
        if one is not None:
            found[module] = one
    if head_reason is not None:
        found[model] = head_reason
    return found


def named_once(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every module once, with all its names joined by " = "."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name or type(model).__name__)
    return [(" = ".join(all_names), module) for module, all_names in names.items()]


def exchange_all(exchanges: list[Exchange]) -> None:
    """Make all exchanges; if one fails, undo the others and raise."""
    undo: list[Callable[[], None]] = []
    try:
        for exchange in exchanges:
            undo.append(exchange.make())
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def find_exchange(name: str, module: nn.Module) -> Exchange | str | None:
    """Return the exchange for a module; the reason if it resembles a fused module but must stay; None for others."""
    kind = type(module)
    if isinstance(module, FUSED):
        return None
    base = next((base for base in DROP_INS if isinstance(module, base)), None)
    is_gelu = base is None and "gelu" in kind.__name__.lower() and not module._parameters and not module._modules
    is_norm = base is None and ("rmsnorm" in kind.__name__.lower() or _looks_like_a_norm(module))
    gated = gating(module) if base is None and not is_gelu and not is_norm else None
    if base is None and not is_gelu and not is_norm and gated is None:
        return None
    if base is not None and base is not kind:
        return f"a subclass of {base.__name__}, with methods of its own"
    if _is_wrapped(module):
        return _WRAPPED
    if base is not None:
        if isinstance(module, nn.CrossEntropyLoss) and module.weight is not None:
            return "class weights have no fused kernel"
        return Exchange(name, module, DROP_INS[base], {})
    if is_gelu:
        # Without hooks: the comparison is about the class.
        approximate = gelu_of(_bare(module))
        unlike = "its result differs from torch.nn.GELU with both approximations"
        return unlike if approximate is None else Exchange(name, module, GELU, {"approximate": approximate})
    if gated is not None:
        return gated if isinstance(gated, str) else Exchange(name, module, gated_class(kind), gated)  # type: ignore[arg-type]
    found = adoption(module)
    return found if isinstance(found, str) else Exchange(name, module, AdoptedRMSNorm, found)


def _find_head(name: str, module: nn.Module) -> Exchange | str:
    return _WRAPPED if _is_wrapped(module) else Exchange(name, module, FusedHead, {})


def _find_rotary(name: str, module: nn.Module, tables: list[bool]) -> Exchange | str:
    """Return the exchange for an attention module, given whether each module that makes tables has equal halves."""
    if _is_wrapped(module):
        return _WRAPPED
    if not tables or not all(tables):
        return "no module makes its cos and sin with the same angles in both halves"
    kind = fused_class(type(module))  # type: ignore[arg-type]
    if kind is None:
        return "its rotary embedding is not the fused one (each half by cos and sin), or not where it can be exchanged"
    return Exchange(name, module, kind, {})


def _is_wrapped(module: nn.Module) -> bool:
    """Whether another library or module.compile() stored a forward in the instance, which would call the old class."""
    return "forward" in module.__dict__ or module.__dict__.get("_compiled_call_impl") is not None


def _bare(module: nn.Module) -> nn.Module:
    """Return a copy of the module without hooks."""
    twin = type(module).__new__(type(module))
    twin.__dict__ = {**module.__dict__, **{k: v for k, v in nn.Module().__dict__.items() if "hook" in k}}
    return twin


def _looks_like_a_norm(module: nn.Module) -> bool:
    """Return whether the module has one weight vector, perhaps a bias vector, and a number eps."""
    shapes = {name: p.dim() for name, p in module.named_parameters()}
    has_eps = any(isinstance(getattr(module, name, None), float) for name in EPS_NAMES)
    is_batch_norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
    return has_eps and not is_batch_norm and set(shapes.values()) == {1} and set(shapes) <= {"weight", "bias"}

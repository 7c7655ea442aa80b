"""Groups of layers that must be sharded together, and the reasons why a group cannot be sharded."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.interop.adapters import adapter_obstacle, is_lora, wrapped_layers, wraps
from fused_megatron.interop.embeddings import embedding_scale
from fused_megatron.interop.known_experts import experts_obstacle
from fused_megatron.interop.known_layers import HEAD_DIMS, NUM_HEADS
from fused_megatron.interop.plans import COLUMN_STYLES, PARTS, STYLES, Plan
from fused_megatron.modules import FusedHead

# Styles for which a wrapper of PEFT is a module like any other.
_OF_WRAPPERS = ("replicate", "replicated_with_grad_allreduce", "experts")


@dataclass
class Layer:
    """A module that the plan names.

    Attributes:
        names: all names of the module, or of PEFT's wrapper around it; reports use the first.
        module: the module.
        style: its style in the plan.
        copies: number of ranks that hold the same output features (with fewer key-value heads than ranks).
        wrapper: PEFT's wrapper around the module; None without one.
        inside: path of the module inside its wrapper; empty without one.
    """

    names: tuple[str, ...]
    module: nn.Module
    style: str
    copies: int = 1
    wrapper: nn.Module | None = None
    inside: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """All names of the module itself."""
        return tuple(f"{name}.{self.inside}" for name in self.names) if self.inside else self.names

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass
class Unit:
    """Layers that must be sharded together: colwise layers, the layers in between, and the rowwise layers.

    Attributes:
        parent: name of the module around the colwise layers.
        layers: the layers.
        reason: why the unit stays replicated; empty if it is sharded.
    """

    parent: str
    layers: list[Layer] = field(default_factory=list)
    reason: str = ""

    def of(self, *styles: str) -> list[Layer]:
        return [layer for layer in self.layers if layer.style in styles]

    @property
    def entering(self) -> list[Layer]:
        """The layers that take the unit's input, of a module to save only its trained copy."""
        layers = self.of(*COLUMN_STYLES, "colwise_gather_output")
        return [layer for layer in layers if layer.inside != "original_module"]

    @property
    def is_open(self) -> bool:
        """Whether the colwise or the rowwise layers are missing; the next modules may have them."""
        return bool(self.of(*COLUMN_STYLES)) != bool(self.of("rowwise"))

    @property
    def stack_layer(self) -> str:
        """Name of the stack's layer around the unit: the name up to its first number; empty outside of stacks."""
        found = re.match(r"(?:.*?\.)??\d+(?=\.|$)", self.layers[0].name)
        return found.group() if found else ""


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D, a linear with weight [in, out]. Needs no import of transformers."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(weight, nn.Parameter)
        and tuple(weight.shape) == (getattr(module, "nx", None), getattr(module, "nf", None))
    )


def obstacle(module: nn.Module, style: str) -> str:
    """Return why this module cannot have this style; empty if it can."""
    kind = type(module).__name__
    if style not in STYLES:
        return f"style {style!r} is not one of: {', '.join(STYLES)}"
    if style == "replicate":
        return ""
    if "forward" in module.__dict__ or module.__dict__.get("_compiled_call_impl") is not None:
        return "its forward was replaced or compiled by something else (parallelize first)"
    if any(hasattr(parameter, "placements") for parameter in module.parameters(recurse=False)):
        return "its parameters are DTensors already"
    if style == "experts":
        return experts_obstacle(module)
    if style == "replicated_with_grad_allreduce":
        return "" if module._parameters else f"a {kind} has no parameters of its own"
    if style in ("embedding_rowwise", "embedding_colwise"):
        if wraps(module):
            return "an adapter of an embedding keeps it whole (merge it first, or target the linears only)"
        scaled = style == "embedding_rowwise" and embedding_scale(module) is not None
        if type(module) is not nn.Embedding and not scaled:
            return f"a {kind} is no plain torch.nn.Embedding, nor one times a number"
        assert isinstance(module, nn.Embedding)
        options = [o for o in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(module, o)]
        return f"{options[0]} of torch.nn.Embedding has no parallel counterpart" if options else ""
    if type(module) not in (nn.Linear, FusedHead) and not is_transposed_linear(module):
        return f"a {kind} is no plain torch.nn.Linear (merge adapters, undo wrappers, or leave it out of the plan)"
    plain = set(module._parameters) <= {"weight", "bias"} and isinstance(module._parameters["weight"], nn.Parameter)
    return "" if plain and not module._buffers else f"the {kind} has parameters other than weight and bias"


def planned_layers(model: nn.Module, plan: Plan) -> tuple[list[Layer], dict[str, str]]:
    """Return every module that the plan names, once and in order; and by name, why some cannot have their style."""
    names_by_module: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_by_module.setdefault(module, []).append(name)
    layers, reasons = [], {}
    for module, names in names_by_module.items():
        styles = {plan.styles.get(name) for name in names}
        if styles == {None}:
            continue
        style = next(s for s in (plan.styles.get(name) for name in names) if s)
        wrapped = [("", module)] if style in _OF_WRAPPERS else list(wrapped_layers(module))
        reason = next((fault for _, inner in wrapped if (fault := obstacle(inner, style))), "")
        if is_lora(module) and style not in _OF_WRAPPERS:
            reason = reason or adapter_obstacle(module, style)
        if len(styles) > 1:
            reason = f"it is one module with the names {', '.join(names)}, to which the plan gives different styles"
        if reason:
            reasons[names[0]] = reason
        for path, inner in wrapped:
            layers.append(Layer(tuple(names), inner, style, wrapper=module if path else None, inside=path))
    return layers, reasons


def group_units(layers: list[Layer], reasons: dict[str, str]) -> list[Unit]:
    """Group sharded layers into units: the layers of one parent, and of the next parents while the unit is open."""
    units: list[Unit] = []
    by_parent: dict[str, Unit] = {}
    for layer in layers:
        if layer.style in ("replicate", "embedding_rowwise", "experts"):
            continue
        unit = by_parent.get(layer.parent)
        if unit is None:
            last = units[-1] if units else None
            joins = last is not None and last.is_open and layer.style == "rowwise"
            unit = last if joins and last is not None else Unit(layer.parent)
            if not joins:
                units.append(unit)
            by_parent[layer.parent] = unit
        unit.layers.append(layer)
    for unit in units:
        blocked = next((layer for layer in unit.layers if layer.name in reasons), None)
        if blocked is not None:
            unit.reason = reasons[blocked.name]
            if len(unit.layers) > 1:
                unit.reason = f"{blocked.name}: {unit.reason}"
        elif unit.is_open:
            present, missing = ("colwise", "rowwise") if unit.of(*COLUMN_STYLES) else ("rowwise", "colwise")
            instead = "colwise_gather_output" if present == "colwise" else "rowwise_split_input"
            unit.reason = f"{present} without a {missing} layer beside it (plan one, or {instead!r})"
    return units


def width_fault(unit: Unit, asked: frozenset[str]) -> str:
    """Return why a rowwise layer cannot take the shards of a colwise layer: widths differ. Empty if it can.

    A layer that stacks parts needs a packed style: under "colwise" the ranks would get different parts, and compute
    wrong numbers of the right shapes. A model's own tp_plan may say "colwise" for parts that alternate by head, so
    only layers whose style the user wrote (`asked`) are checked for this.
    """
    columns: list[Layer] = []
    for layer in unit.layers:
        if layer.style in COLUMN_STYLES:
            columns.append(layer)
        if layer.style != "rowwise":
            continue
        inputs = linear_features(layer.module)[1]
        for column in columns:
            only_column = column.name in asked and len(columns) == 1 and column.style == "colwise"
            outputs = linear_features(column.module)[0]
            if (only_column or column.style in PARTS) and outputs != inputs * PARTS.get(column.style, 1):
                return (
                    f"{column.name} has {outputs} features where {layer.name} takes {inputs} ('packed_colwise' is for "
                    "2 equal parts one after the other, 'packed_colwise_3' for 3, 'interleaved_colwise' for parts "
                    "that alternate head by head)"
                )
        columns = []
    return ""


def undecided_parameter(unit: Unit, model: nn.Module, planned: set[nn.Module]) -> str:
    """Return why an untried unit stays replicated: a parameter may be used between its layers. Empty if none may.

    Between the layers, a parameter sees this rank's features only, and its gradient is incomplete. A parameter may be
    used there if its width divides the sharded width: a scalar, a norm of single heads.
    """
    columns = [linear_features(layer.module) for layer in unit.of(*COLUMN_STYLES)]
    for name, module in model.get_submodule(unit.parent).named_modules() if columns else ():
        for key, parameter in module._parameters.items() if module not in planned else ():
            if parameter is None or (parameter.dim() > 1 and parameter.numel() > parameter.shape[-1]):
                continue
            width = parameter.shape[-1] if parameter.dim() else 1
            if any(features % max(width, 1) == 0 and width != inputs for features, inputs in columns):
                return (
                    f"{'.'.join(part for part in (unit.parent, name, key) if part)} would see this rank's features "
                    "only, if it stands between the layers (give its module a style: 'replicated_with_grad_allreduce', "
                    "or 'replicate' where it does not)"
                )
    return ""


def linear_features(module: Any) -> tuple[int, int]:
    """Return (out_features, in_features)."""
    rows, columns = module.weight.shape
    return (columns, rows) if is_transposed_linear(module) else (rows, columns)


def divide_unit(
    unit: Unit, model: nn.Module, ranks: int, asked: frozenset[str] = frozenset()
) -> tuple[tuple[nn.Module, str, int], ...]:
    """Divide the sizes of a unit by the ranks. Set the layers' `copies`; return (module, name, value) to change.

    Args:
        unit: the layers.
        model: the model.
        ranks: R.
        asked: names of the layers whose style the user wrote.

    Raises:
        InputError: a size does not divide; names the weight, the numbers, and sizes that fit.
    """
    way_out = _whole_instead(unit, asked)
    parent = model.get_submodule(unit.parent)
    changes = _divide_heads(unit, parent, ranks, way_out) if unit.of(*COLUMN_STYLES) else ()
    for layer in unit.layers:
        outputs, inputs = (0, 0)
        if layer.style != "replicated_with_grad_allreduce":
            outputs, inputs = linear_features(layer.module)
        size, what = (outputs, "out_features") if layer.style in COLUMN_STYLES else (inputs, "in_features")
        sharded = layer.style in (*COLUMN_STYLES, "rowwise", "rowwise_split_input", "embedding_colwise")
        if sharded and size % (ranks // layer.copies * PARTS.get(layer.style, 1)):
            raise InputError(_wrong_size(layer, what, size // PARTS.get(layer.style, 1), ranks, way_out))
    return changes


def _divide_heads(unit: Unit, parent: nn.Module, ranks: int, way_out: str) -> tuple[tuple[nn.Module, str, int], ...]:
    head_dim = next((v for n in HEAD_DIMS if isinstance(v := getattr(parent, n, None), int)), None)
    if head_dim is None:
        return ()
    config = getattr(parent, "config", None)
    heads = next((v for o in (config, parent) for n in NUM_HEADS if isinstance(v := getattr(o, n, None), int)), None)
    columns = unit.of("colwise", "interleaved_colwise")
    counts = {layer.name: linear_features(layer.module)[0] // head_dim for layer in columns}
    heads = heads or max(counts.values(), default=0)
    if heads % ranks:
        raise InputError(_wrong_size(unit.of(*COLUMN_STYLES)[0], "num_attention_heads", heads, ranks, way_out))
    copied = [layer for layer in columns if len(columns) > 1 and counts[layer.name] % ranks]
    for layer in copied:
        count = counts[layer.name]
        if ranks % count or not isinstance(getattr(parent, "num_key_value_groups", None), int):
            raise InputError(_wrong_size(layer, "num_key_value_heads", count, ranks, way_out))
        layer.copies = ranks // count
    return ((parent, "num_key_value_groups", heads // ranks),) if copied else ()


def _whole_instead(unit: Unit, asked: frozenset[str]) -> str:
    """Return the plan that keeps a unit whole and shards what was to be sharded besides."""
    around = unit.parent.rpartition(".")[2]
    named = not around or around.isdigit()
    patterns = [layer.name.rpartition(".")[2] for layer in unit.layers] if named else [f"{around}.*"]
    whole = ", ".join(f"{pattern!r}: 'replicate'" for pattern in dict.fromkeys(patterns))
    others = ".." if any(layer.name in asked for layer in unit.layers) else "'*': 'default'"
    return f"plan={{{others}, {whole}}}"


def _wrong_size(layer: Layer, what: str, size: int, ranks: int, way_out: str) -> str:
    fits = ", ".join(str(r) for r in range(1, size + 1) if size % r == 0 and r <= 64)
    return (
        f"{layer.name}.weight: {what}={size} must be divisible by tensor_parallel_size={ranks} "
        f"(tensor_parallel_size could be {fits}; or {way_out} keeps it whole with the layers beside it)"
    )


def modules_with_own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (first name, module) of every module that has parameters of its own."""
    for name, module in model.named_modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            yield name, module

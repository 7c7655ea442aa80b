"""Layers that only make sense in shards together, and whether all of them can be."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.interop.embeddings import embedding_scale
from fused_megatron.interop.known_layers import HEAD_DIMS, NUM_HEADS
from fused_megatron.interop.plans import COLUMN_STYLES, PARTS, STYLES, Plan


@dataclass
class Layer:
    """A module that the plan names.

    Attributes:
        names: all of them; the first counts.
        copies: how many ranks hold the same output features (key-value heads that are fewer than ranks).
    """

    names: tuple[str, ...]
    module: nn.Module
    style: str
    copies: int = 1

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass
class Unit:
    """Layers of which either all are sharded or none: colwise ones, what stands between, and the rowwise ones.

    Attributes:
        parent: the module around the colwise layers.
        reason: why the unit stays whole; empty where it does not.
    """

    parent: str
    layers: list[Layer] = field(default_factory=list)
    reason: str = ""

    def of(self, *styles: str) -> list[Layer]:
        return [layer for layer in self.layers if layer.style in styles]

    @property
    def entering(self) -> list[Layer]:
        """The layers that the unit's input goes to."""
        return self.of(*COLUMN_STYLES, "colwise_gather_output")

    @property
    def is_open(self) -> bool:
        """A part is missing, which the next modules may bring: what shards, or what takes the shards."""
        return bool(self.of(*COLUMN_STYLES)) != bool(self.of("rowwise"))

    @property
    def stack_layer(self) -> str:
        """The name of the layer of a stack that the unit is in: up to the first number; empty where there is none."""
        found = re.match(r"(?:.*?\.)??\d+(?=\.|$)", self.layers[0].name)
        return found.group() if found else ""


def is_transposed_linear(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer with its weight as [in, out]; known by its shape, without importing it."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(weight, nn.Parameter)
        and tuple(weight.shape) == (getattr(module, "nx", None), getattr(module, "nf", None))
    )


def obstacle(module: nn.Module, style: str) -> str:
    """Why this module cannot take this style; empty where it can."""
    kind = type(module).__name__
    if style not in STYLES:
        return f"style {style!r} is not one of: {', '.join(STYLES)}"
    if style == "replicate":
        return ""
    if "forward" in module.__dict__ or module.__dict__.get("_compiled_call_impl") is not None:
        return "its forward was replaced or compiled by something else (parallelize first)"
    if any(hasattr(parameter, "placements") for parameter in module.parameters(recurse=False)):
        return "its parameters are DTensors already"
    if style == "replicated_with_grad_allreduce":
        return "" if module._parameters else f"a {kind} has no parameters of its own"
    if style in ("embedding_rowwise", "embedding_colwise"):
        scaled = style == "embedding_rowwise" and embedding_scale(module) is not None
        if type(module) is not nn.Embedding and not scaled:
            return f"a {kind} is no plain torch.nn.Embedding, nor one times a number"
        assert isinstance(module, nn.Embedding)
        options = [o for o in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(module, o)]
        return f"{options[0]} of torch.nn.Embedding has no parallel counterpart" if options else ""
    if type(module) is not nn.Linear and not is_transposed_linear(module):
        return f"a {kind} is no plain torch.nn.Linear (merge adapters, undo wrappers, or leave it out of the plan)"
    plain = set(module._parameters) <= {"weight", "bias"} and isinstance(module._parameters["weight"], nn.Parameter)
    return "" if plain and not module._buffers else f"the {kind} has parameters other than weight and bias"


def planned_layers(model: nn.Module, plan: Plan) -> tuple[list[Layer], dict[str, str]]:
    """Every module that the plan names, once, in the order of the model; and why some cannot be, by name."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    layers, reasons = [], {}
    for module, alike in names.items():
        styles = {plan.styles.get(name) for name in alike}
        if styles == {None}:
            continue
        style = next(s for s in (plan.styles.get(name) for name in alike) if s)
        reason = obstacle(module, style)
        if len(styles) > 1:
            reason = f"it is one module with the names {', '.join(alike)}, to which the plan gives different styles"
        if reason:
            reasons[alike[0]] = reason
        layers.append(Layer(tuple(alike), module, style))
    return layers, reasons


def group_units(layers: list[Layer], reasons: dict[str, str]) -> list[Unit]:
    """Sharded layers in units: those of one parent, and of the next parents while a unit is open."""
    units: list[Unit] = []
    by_parent: dict[str, Unit] = {}
    for layer in layers:
        if layer.style in ("replicate", "embedding_rowwise"):
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
            alone, wanted = ("colwise", "rowwise") if unit.of(*COLUMN_STYLES) else ("rowwise", "colwise")
            instead = "colwise_gather_output" if alone == "colwise" else "rowwise_split_input"
            unit.reason = f"{alone} without a {wanted} layer beside it (plan one, or {instead!r})"
    return units


def width_fault(unit: Unit, explicit: bool) -> str:
    """Why shards of a colwise layer are not what its rowwise layer takes: features are cut or joined in between.

    Were "colwise" taken for a stack of parts, each rank would have other parts: wrong numbers, of the right shapes.
    Models that say so themselves have parts that alternate by head.
    """
    columns: list[Layer] = []
    for layer in unit.layers:
        if layer.style in COLUMN_STYLES:
            columns.append(layer)
        if layer.style != "rowwise":
            continue
        inputs = linear_features(layer.module)[1]
        for column in columns:
            alone = explicit and len(columns) == 1 and column.style == "colwise"
            outputs = linear_features(column.module)[0]
            if (alone or column.style in PARTS) and outputs != inputs * PARTS.get(column.style, 1):
                return (
                    f"{column.name} has {outputs} features where {layer.name} takes {inputs} ('packed_colwise' is for "
                    "2 equal parts one after the other, 'packed_colwise_3' for 3, 'interleaved_colwise' for parts "
                    "that alternate head by head)"
                )
        columns = []
    return ""


def undecided_parameter(unit: Unit, model: nn.Module, planned: set[nn.Module]) -> str:
    """Why a unit that could not be tried stays whole: a parameter beside it that may stand between its layers.

    There it would see this rank's features only, and its gradient would be a part. What can stand there has the width
    that is cut, or divides it: a number, a norm of single heads.
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
    """(output features, input features)."""
    rows, columns = module.weight.shape
    return (columns, rows) if is_transposed_linear(module) else (rows, columns)


def divide_unit(unit: Unit, model: nn.Module, ranks: int) -> tuple[tuple[nn.Module, str, int], ...]:
    """Raise unless the sizes of a unit can be divided; sets copies, returns attributes that must change with them.

    Raises:
        InputError: naming the weight, the numbers, and what would fit.
    """
    changes = _divide_heads(unit, model.get_submodule(unit.parent), ranks) if unit.of(*COLUMN_STYLES) else ()
    for layer in unit.layers:
        outputs, inputs = (0, 0)
        if layer.style != "replicated_with_grad_allreduce":
            outputs, inputs = linear_features(layer.module)
        size, what = (outputs, "out_features") if layer.style in COLUMN_STYLES else (inputs, "in_features")
        sharded = layer.style in (*COLUMN_STYLES, "rowwise", "rowwise_split_input", "embedding_colwise")
        if sharded and size % (ranks // layer.copies * PARTS.get(layer.style, 1)):
            raise InputError(_wrong_size(layer, what, size // PARTS.get(layer.style, 1), ranks))
    return changes


def _divide_heads(unit: Unit, parent: nn.Module, ranks: int) -> tuple[tuple[nn.Module, str, int], ...]:
    head_dim = next((v for n in HEAD_DIMS if isinstance(v := getattr(parent, n, None), int)), None)
    if head_dim is None:
        return ()
    config = getattr(parent, "config", None)
    heads = next((v for o in (config, parent) for n in NUM_HEADS if isinstance(v := getattr(o, n, None), int)), None)
    columns = unit.of("colwise", "interleaved_colwise")
    counts = {layer.name: linear_features(layer.module)[0] // head_dim for layer in columns}
    heads = heads or max(counts.values(), default=0)
    if heads % ranks:
        raise InputError(_wrong_size(unit.of(*COLUMN_STYLES)[0], "num_attention_heads", heads, ranks))
    copied = [layer for layer in columns if len(columns) > 1 and counts[layer.name] % ranks]
    for layer in copied:
        count = counts[layer.name]
        if ranks % count or not isinstance(getattr(parent, "num_key_value_groups", None), int):
            raise InputError(_wrong_size(layer, "num_key_value_heads", count, ranks))
        layer.copies = ranks // count
    return ((parent, "num_key_value_groups", heads // ranks),) if copied else ()


def _wrong_size(layer: Layer, what: str, size: int, ranks: int) -> str:
    fits = ", ".join(str(r) for r in range(1, size + 1) if size % r == 0 and r <= 64)
    return (
        f"{layer.name}.weight: {what}={size} must be divisible by tensor_parallel_size={ranks} "
        f"(tensor_parallel_size could be {fits}; or plan={{{layer.name.split('.')[-1]!r}: 'replicate', ..}} "
        "with the layers beside it)"
    )


def modules_with_own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(first name, module) of everything that holds parameters itself."""
    for name, module in model.named_modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            yield name, module

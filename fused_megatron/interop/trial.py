"""A trial forward of a sharded model on the meta device, to find layers that cannot be sharded.

It also finds replicated parameters between sharded layers: their gradients must be summed over the ranks.

The model is not changed: the trial runs a copy without memory, whose sharded layers have this rank's shapes. Ranks do
not communicate.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fused_megatron.interop.known_experts import experts_obstacle
from fused_megatron.interop.meta_run import MetaCall, MetaRun, joined, name_inside, on_meta
from fused_megatron.interop.replacements import Replacement
from fused_megatron.interop.units import Unit, linear_features
from fused_megatron.ops.product import product

# Tokens of the trial: few enough for every model.
_TOKENS = 8
# Limit for the classes of modules to skip because they need values (experts that count their tokens).
_DETOURS = 4
# Styles of layers whose input or output holds only this rank's features.
_ROW = "rowwise"
_CUT = ("colwise", "packed_colwise", "packed_colwise_3", "interleaved_colwise", "embedding_colwise", _ROW)


@dataclass
class TrialResult:
    """Result of a trial.

    Attributes:
        tried: units that were tried; the others could not run without values.
        faults: (unit, reason) of units that must stay replicated.
        summed: by module, names of parameters that each rank uses with its own features only.
        users: by the same modules, the modules whose forwards use these parameters.
    """

    tried: list[Unit] = field(default_factory=list)
    faults: list[tuple[Unit, str]] = field(default_factory=list)
    summed: dict[nn.Module, list[str]] = field(default_factory=dict)
    users: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)


class _Edge(NamedTuple):
    """A sharded layer that ran: its name, and the autograd nodes of its input and of its output."""

    name: str
    before: Any
    after: Any


class _Boundary(torch.autograd.Function):
    """Identity with an autograd node of its own, which in-place operations cannot replace."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy


class _StandIn(nn.Module):
    """A sharded layer with this rank's shapes, without communication."""

    def __init__(self, replacement: Replacement, edges: list[_Edge]) -> None:
        super().__init__()
        self._layer = replacement.layer
        self._edges = edges
        for name, parameter in replacement.module._parameters.items():
            self.register_parameter(name, None if parameter is None else on_meta(parameter))
        for name in ("in_features", "out_features", "num_embeddings"):
            if hasattr(replacement.module, name):
                setattr(self, name, getattr(replacement.module, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self._parameters["weight"]
        is_table = self._layer.style == "embedding_colwise"
        y = F.embedding(x, weight) if is_table else product(x, weight, self._parameters["bias"])
        y = _Boundary.apply(y)
        self._edges.append(_Edge(self._layer.name, x.grad_fn, y.grad_fn))
        return y


def try_shards(
    model: nn.Module, units: list[Unit], replacements: list[Replacement], attributes: list[tuple[nn.Module, str, int]]
) -> TrialResult:
    """Run the model with this rank's shapes. If that fails, run it unsharded: if both fail, shards are not the cause.

    If the model cannot run without values, or its arguments are unknown, the trial runs the module around each unit
    instead. Only the first of several identical layers runs; its result holds for the others.

    Args:
        model: on any device.
        units: the units to shard.
        replacements: their parallel layers.
        attributes: (module, name, new value) of the numbers that change with them.
    """
    units = [unit for unit in units if unit.of(*_CUT)]
    trial = _Trial(model, units, [r for r in replacements if r.layer.style in _CUT], attributes)
    if units and not any(trial.attempt(call, trial.groups) for call in _calls_of_model(model, units)):
        for group in trial.groups:
            any(trial.attempt(call, [group]) for call in _calls_of_unit(group[0]))
    return trial.result


class _Trial:
    """The trial of one model.

    Attributes:
        repeated: names of layers, and of the first layer that is identical.
        experts: classes of known experts.
        groups: corresponding units of identical layers, one list each.
        result: filled by each attempt.
    """

    def __init__(
        self,
        model: nn.Module,
        units: list[Unit],
        replacements: list[Replacement],
        attributes: list[tuple[nn.Module, str, int]],
    ) -> None:
        self.model = model
        self.units = units
        self.replacements = replacements
        self.result = TrialResult()
        names = {module: name for name, module in model.named_modules()}
        self.attributes = [(names[module], attribute, value) for module, attribute, value in attributes]
        self.repeated = _same_layers(model, units)
        # Experts count their tokens. Known ones are not run, so that no attempt fails for that.
        self.experts = {type(module) for module in names if not experts_obstacle(module)}
        groups: dict[str, list[Unit]] = {}
        for unit in units:
            groups.setdefault(self._first_name(unit), []).append(unit)
        self.groups = list(groups.values())

    def attempt(self, call: MetaCall, groups: list[list[Unit]]) -> bool:
        """Try one call; return whether it settled the groups. If so, the result has them."""
        call.repeated = self.repeated
        call.avoided |= self.experts
        edges: list[_Edge] = []
        run = MetaRun(self.model, call, self._change(call, edges))
        if run.error is not None:
            if not self._runs_whole(call):
                return False
            edges.clear()
            run = MetaRun(self.model, call, self._change(call, edges))
        units = [unit for group in groups for unit in group]
        if run.error is not None:
            self.result.tried += units
            where = (run.inside or [""])[-1] or type(self.model).__name__
            blamed = _blamed(run.inside, units)
            self.result.faults += [(unit, f"in shards {where} fails: {run.text}") for unit in blamed]
        else:
            # A unit that did not run, or only in part, may have parameters between its layers.
            ran = {edge.name for edge in edges}
            groups = [group for group in groups if ran.issuperset(layer.name for layer in group[0].of(_ROW))]
            groups = [group for group in groups if not self._skipped_a_module(group[0], call)]
            self.result.tried += [unit for group in groups for unit in group]
            self._follow_gradients(run, edges, groups)
        return True

    def _first_name(self, unit: Unit) -> str:
        """Return the name of the unit's parent in the first identical layer."""
        first = self.repeated.get(unit.stack_layer)
        return unit.parent if first is None else joined(first, name_inside(unit.stack_layer, unit.parent) or "")

    def _change(self, call: MetaCall, edges: list[_Edge]) -> Callable[[nn.Module], None]:
        """Return a function that gives a copy of the model this rank's shapes."""

        def change(twin: nn.Module) -> None:
            for name, attribute, value in self.attributes:
                if (inner := name_inside(call.root, name)) is not None:
                    setattr(twin.get_submodule(inner), attribute, value)
            for replacement in self.replacements:
                stand_in = _StandIn(replacement, edges)
                for name in replacement.layer.names:
                    if inner := name_inside(call.root, name):  # of a wrapper: adapters have the shapes of their layer
                        parent, _, child = inner.rpartition(".")
                        twin.get_submodule(parent)._modules[child] = stand_in

        return change

    def _runs_whole(self, call: MetaCall) -> bool:
        """Whether the unsharded model runs this call; adds classes of modules to skip to `call.avoided`."""
        sharded = [layer.name for unit in self.units for layer in unit.layers]
        for _ in range(_DETOURS if call.keywords else 1):  # guessed positional arguments must fit without skipping
            run = MetaRun(self.model, call, None)
            if run.error is None:
                return True
            where = (run.inside or [""])[-1]
            if where in ("", call.root) or any(name_inside(where, name) is not None for name in sharded):
                return False
            call.avoided.add(type(self.model.get_submodule(where)))
        return False

    def _skipped_a_module(self, unit: Unit, call: MetaCall) -> bool:
        around = self.model.get_submodule(_common_parent(unit))
        return any(type(module) in call.avoided for module in around.modules())

    def _follow_gradients(self, run: MetaRun, edges: list[_Edge], groups: list[list[Unit]]) -> None:
        """Find parameters between colwise and rowwise layers: their gradients come from this rank's features only."""
        rows = {layer.name for unit in self.units for layer in unit.of(_ROW)}
        into_shards = {edge.after for edge in edges if edge.name not in rows}
        out_of_shards = {edge.after for edge in edges if edge.name in rows}
        ends = [*run.outputs, *(edge.before for edge in edges if edge.name not in rows)]
        elsewhere = _leaves(ends, out_of_shards)
        for group in groups:
            unit = group[0]
            mine = {layer.name for layer in unit.of(_ROW)}
            between = _leaves([edge.before for edge in edges if edge.name in mine], into_shards)
            names = sorted(run.originals.get(leaf, "") for leaf in between)
            mixed = sorted(run.originals[leaf] for leaf in between & elsewhere if leaf in run.originals)
            own = set(self.model.get_submodule(_common_parent(unit)).parameters())
            fault = ""
            if any(not name or self.model.get_parameter(name) not in own for name in names):
                fault = f"{unit.of(_ROW)[0].name} takes what is made of whole activations, and not of shards only"
            elif mixed:
                fault = f"{mixed[0]} is used between its layers and elsewhere, too"
            for one in group:
                if fault:
                    self.result.faults.append((one, fault))
                else:
                    self._sum(one, names, _runs_all(unit, run))

    def _sum(self, unit: Unit, names: list[str], user: str) -> None:
        """Add parameters to the summed ones.

        Args:
            names: of the parameters.
            user: name of the module whose forward uses them. All names are those in the first identical layer.
        """
        planned = [layer.module for layer in unit.of("replicated_with_grad_allreduce")]
        for name in names:
            owner, _, key = name.rpartition(".")
            module = self._in_layer_of(unit, owner)
            self.result.users.setdefault(module, []).append(self._in_layer_of(unit, user))
            noted = self.result.summed.setdefault(module, []) if module not in planned else [key]
            if key not in noted:  # several layers may share the module
                noted.append(key)

    def _in_layer_of(self, unit: Unit, name: str) -> nn.Module:
        """Return the module that corresponds, in the layer of the unit, to a name in the first identical layer."""
        first = self.repeated.get(unit.stack_layer)
        inner = None if first is None else name_inside(first, name)
        return self.model.get_submodule(name if inner is None else joined(unit.stack_layer, inner))


def _runs_all(unit: Unit, run: MetaRun) -> str:
    """Return the name of the innermost module whose forward ran all sharded layers of the unit."""
    around = [run.around[layer.name] for layer in unit.of(*_CUT) if layer.name in run.around]
    return max(set.intersection(*map(set, around)), key=lambda name: around[0].index(name))


def _leaves(roots: Iterable[Any], stops: set[Any]) -> set[torch.Tensor]:
    """Return the leaf tensors that the roots depend on; the walk does not pass the stops."""
    found = set()
    seen = set(stops)
    waiting = [node for node in roots if node is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting += [after for after, _ in node.next_functions if after is not None]
    return found


def _calls_of_model(model: nn.Module, units: list[Unit]) -> Iterator[MetaCall]:
    """Yield guesses at the arguments of the model."""
    main = getattr(model, "main_input_name", None)
    config = getattr(model, "config", None)
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if main == "input_ids":
        yield MetaCall("", keywords={main: ids, **decoder})
    elif main == "pixel_values":
        size: Any = getattr(config, "image_size", None) or 224
        edges = size if isinstance(size, list | tuple) else (size, size)
        image = torch.empty(1, getattr(config, "num_channels", 3), *edges, dtype=dtype, device="meta")
        yield MetaCall("", keywords={main: image})
    elif main == "input_features":
        bands = getattr(config, "num_mel_bins", 80)
        length = 2 * getattr(config, "max_source_positions", 1500)
        sound = torch.empty(1, bands, length, dtype=dtype, device="meta")
        yield MetaCall("", keywords={main: sound, **decoder})
    elif main is None:
        if any(isinstance(module, nn.Embedding) for module in model.modules()):
            yield MetaCall("", (ids,))
        for width in dict.fromkeys(linear_features(u.entering[0].module)[1] for u in units if u.entering):
            yield from _calls_of_activations("", width, dtype)


def _same_layers(model: nn.Module, units: list[Unit]) -> dict[str, str]:
    """Return, by layer name, the first layer with the same modules, shapes and styles; first layers are left out."""
    firsts: dict[Any, str] = {}
    same = {}
    for layer in dict.fromkeys(unit.stack_layer for unit in units):
        own = [unit for unit in units if unit.stack_layer == layer]
        names = [name_inside(layer, one.name) for unit in own for one in unit.layers]
        if not layer or not all(names):
            continue
        built = [
            (name, type(module), [tuple(p.shape) for p in module.parameters(recurse=False)])
            for name, module in model.get_submodule(layer).named_modules()
        ]
        styles = [one.style for unit in own for one in unit.layers]
        first = firsts.setdefault(repr((_numberless(layer), built, names, styles)), layer)
        if first != layer:
            same[layer] = first
    return same


def _calls_of_unit(unit: Unit) -> Iterator[MetaCall]:
    """Yield calls of the module around a unit: most MLPs take only their activations."""
    if unit.entering and unit.parent and unit.parent == _common_parent(unit):
        first: Any = unit.entering[0].module
        yield from _calls_of_activations(unit.parent, linear_features(first)[1], first.weight.dtype)


def _calls_of_activations(root: str, width: int, dtype: torch.dtype) -> Iterator[MetaCall]:
    for shape in ((1, _TOKENS, width), (_TOKENS, width)):
        yield MetaCall(root, (torch.empty(shape, dtype=dtype, device="meta"),))


def _blamed(inside: list[str], units: list[Unit]) -> list[Unit]:
    """Return the units in or around the innermost module that failed, and the same units of the other layers."""
    for name in reversed(inside):
        around = [unit for unit in units if name_inside(_common_parent(unit), name) is not None]
        closest = max((len(_common_parent(unit)) for unit in around), default=0)
        found = [unit for unit in around if len(_common_parent(unit)) == closest]
        found = found or [unit for unit in units if name_inside(name, _common_parent(unit)) is not None]
        if found:
            parents = {_numberless(_common_parent(unit)) for unit in found}
            return [unit for unit in units if _numberless(_common_parent(unit)) in parents]
    return units


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _common_parent(unit: Unit) -> str:
    """Return the name of the innermost module that holds all layers of a unit."""
    common = unit.parent.split(".")
    while not all(layer.parent.split(".")[: len(common)] == common for layer in unit.layers):
        common.pop()
    return ".".join(common)

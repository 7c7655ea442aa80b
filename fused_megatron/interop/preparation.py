"""The changes that parallelize makes to a model: planned and checked in full first, then committed."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fused_megatron import modules
from fused_megatron.checks import InputError
from fused_megatron.collectives import Group, group_size
from fused_megatron.interop.adapters import adapted_models
from fused_megatron.interop.known_experts import is_adapted
from fused_megatron.interop.known_layers import HEAD_DIMS, NUM_HEADS
from fused_megatron.interop.layers import ColumnLinear, GatheredLinear, RowLinear, SummedAdoptedRMSNorm
from fused_megatron.interop.plans import Plan, matches
from fused_megatron.interop.refusals import guard_answers, refuse_hidden_states
from fused_megatron.interop.replacements import Replacement, become_shards, kept, layout_of, make_replacement
from fused_megatron.interop.sequence_region import SharedInput
from fused_megatron.interop.sharded_adapters import ShardedAdapters, shard_adapters
from fused_megatron.interop.split_experts import ExpertSplit
from fused_megatron.interop.stacks import Stack, find_stacks
from fused_megatron.interop.summed_parameters import SummedParameters
from fused_megatron.interop.trial import try_shards
from fused_megatron.interop.units import (
    Layer,
    Unit,
    divide_unit,
    group_units,
    modules_with_own_parameters,
    planned_layers,
    undecided_parameter,
    width_fault,
)
from fused_megatron.interop.vocab_logits import LogitsScope
from fused_megatron.modules import Exchange, exchange_all, find_exchanges, named_once
from fused_megatron.tensor_parallel import SequenceParallelLayerNorm, SequenceParallelRMSNorm

_SUMMED: dict[type[nn.Module], type[nn.Module]] = {
    modules.LayerNorm: SequenceParallelLayerNorm,
    modules.RMSNorm: SequenceParallelRMSNorm,
    modules.AdoptedRMSNorm: SummedAdoptedRMSNorm,
}


@dataclass
class Preparation:
    """The planned changes of a model.

    Attributes:
        model: the model; unchanged until commit.
        tp_group: the tensor-parallel ranks.
        plan: the style of every layer.
        overlap: overlap products with their collectives.
        gather_logits: return full logits while gradients are recorded.
        expert_split: the ranks over which experts are split.
        layers: every module that the plan names.
        reasons: by layer name, why the layer stays replicated.
        units: groups of layers that must be sharded together.
        replacements: layers and their parallel replacements, on the meta device.
        exchanges: modules that get another class (fused norms and activations).
        attributes: (module, name, new value) of numbers by which forwards count heads or features.
        retied: (module, parameter name) where a module keeps, but does not use, a second name of a sharded parameter.
        adapters: by sharded layer that PEFT adapts, the parts of its adapters.
        summed: by module, names of replicated parameters whose gradients are summed over the ranks.
        users: by the same modules, the modules whose forwards use these parameters.
        stacks: stacks of layers that will run on blocks of the sequence.
        shared: (module, input): the input that several linears inside the module have in common.
        scope: marks the model's forward, in which its heads return VocabLogits; None without sharded heads.
    """

    model: nn.Module
    tp_group: Group
    plan: Plan
    overlap: bool | int
    gather_logits: bool = True
    expert_split: ExpertSplit = field(default_factory=ExpertSplit)
    layers: list[Layer] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    replacements: list[Replacement] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    attributes: list[tuple[nn.Module, str, int]] = field(default_factory=list)
    retied: list[tuple[nn.Module, str]] = field(default_factory=list)
    adapters: dict[nn.Module, ShardedAdapters] = field(default_factory=dict)
    summed: dict[nn.Module, list[str]] = field(default_factory=dict)
    users: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)
    stacks: list[Stack] = field(default_factory=list)
    shared: list[tuple[nn.Module, SharedInput]] = field(default_factory=list)
    scope: LogitsScope | None = None

    def prepare(self, sequence_parallel: bool) -> None:
        """Plan all changes. Raises InputError as parallelize does."""
        ranks = group_size(self.tp_group)
        self.layers, self.reasons = planned_layers(self.model, self.plan)
        self._check_experts()
        self.units = group_units(self.layers, self.reasons)
        self._block_units()
        self._divide(ranks)
        while ranks > 1 and self._fails_in_shards():
            self._divide(ranks)
        if sequence_parallel and ranks > 1:
            adapters = {module for parts in self.adapters.values() for module in parts.modules}
            self.stacks = find_stacks(self.model, self.units, self.tp_group, set(self.summed), adapters)
            self._sum_adapters()
        self._make_exchanges()
        self._connect()

    def _check_experts(self) -> None:
        """Raise if experts cannot be split as the mesh says. On one rank they stay as they are."""
        experts = [layer for layer in self.layers if layer.style == "experts"]
        if self.expert_split.size == 1:
            self.layers = [layer for layer in self.layers if layer not in experts]
            self.reasons = {name: r for name, r in self.reasons.items() if not any(e.name == name for e in experts)}
            return
        adapted = next((layer.name for layer in experts if is_adapted(layer.module)), None)
        if adapted is not None:
            raise InputError(
                f"{adapted}: LoRA on experts, or another change of their weights, cannot be split over ranks (merge it "
                "first, or leave the experts out of it: adapters of other layers work)"
            )
        if not self.expert_split.moves_tokens:
            return
        refused = next((layer for layer in experts if layer.name in self.reasons), None)
        if refused is not None or not experts:
            why = f"{type(self.model).__name__} has no experts that the plan names"
            if refused is not None:
                why = f"the experts {refused.name} cannot be split: {self.reasons[refused.name]}"
            raise InputError(
                f"{self.expert_split.sizes_text}: {why} (a mesh without them leaves the experts whole on every rank)"
            )

    def _divide(self, ranks: int) -> None:
        """Make the replacements of the units to shard, and the attributes that change with them."""
        self.attributes = []
        for unit in self.units:
            if not unit.reason:
                self.attributes += divide_unit(unit, self.model, ranks, self.plan.asked)
        self._make_replacements()
        sharded = {unit.parent for unit in self.units if not unit.reason}
        for name, attribute in self.plan.divided:
            if name in sharded:
                module = self.model.get_submodule(name)
                # With fewer key-value heads than ranks, heads are copied: each rank has one.
                self.attributes.append((module, attribute, max(1, getattr(module, attribute) // ranks)))
        self._close_fast_paths()

    def _sum_adapters(self) -> None:
        """Sum the gradients of adapters that are whole and see this rank's rows of the sequence only."""
        for stack in self.stacks:
            for layer in (layer for unit in stack.units for layer in unit.layers if layer.module in self.adapters):
                for module in self.adapters[layer.module].whole:
                    self.summed[module] = [name for name, _ in module.named_parameters(recurse=False)]

    def _fails_in_shards(self) -> bool:
        """Try the units in shards; return whether some of them must stay replicated. Also sets `summed`."""
        units = [unit for unit in self.units if not unit.reason]
        trial = try_shards(self.model, units, self.replacements, self.attributes)
        for unit, reason in trial.faults:
            unit.reason = unit.reason or reason
        untried = [unit for unit in units if unit not in trial.tried]
        for unit in untried:
            known = {layer.module for layer in self.layers}
            known |= {module for parts in self.adapters.values() for module in parts.modules}
            unit.reason = unit.reason or undecided_parameter(unit, self.model, known)
        self.summed = trial.summed
        self.users = trial.users
        for unit in units:
            for layer in unit.of("replicated_with_grad_allreduce"):
                self.summed[layer.module] = [name for name, _ in layer.module.named_parameters(recurse=False)]
                if unit in untried:
                    self.users.setdefault(layer.module, []).append(self.model.get_submodule(unit.parent))
        return any(unit.reason for unit in units)

    def _block_units(self) -> None:
        """Mark units that would compute wrong numbers in shards."""
        bare = [p for p in self.plan.unused if any(matches(p, name) for name, _ in self.model.named_parameters())]
        for unit in self.units:
            owner = self.model.get_submodule(unit.parent)
            for pattern in bare:
                if any(matches(pattern, f"{unit.parent}.{name}") for name in owner._parameters):
                    unit.reason = unit.reason or f"the plan shards a bare parameter beside it: {pattern}"
            unit.reason = unit.reason or width_fault(unit, self.plan.asked)

    def _layers_to_replace(self) -> list[Layer]:
        in_units = [layer for unit in self.units if not unit.reason for layer in unit.layers]
        alone = ("embedding_rowwise", "experts")
        ends = [layer for layer in self.layers if layer.style in alone and layer.name not in self.reasons]
        return [*ends, *(layer for layer in in_units if layer.style != "replicated_with_grad_allreduce")]

    def _make_replacements(self) -> None:
        """Make the parallel layers. A layer that shares a parameter with a replicated module stays replicated too."""
        while True:
            layers = self._layers_to_replace()
            self.replacements = [
                make_replacement(layer, self.tp_group, self.overlap, self.expert_split) for layer in layers
            ]
            self.adapters = {
                r.layer.module: shard_adapters(r.layer.names, r.layer.wrapper, r.module)
                for r in self.replacements
                if r.layer.inside == "base_layer"
            }
            self.replacements += [one for parts in self.adapters.values() for one in parts.replacements]
            fault = self._fault_of_ties()
            if fault is None:
                return
            layer, reason = fault
            self.reasons[layer.name] = reason
            for unit in self.units:
                if layer in unit.layers:
                    unit.reason = reason if len(unit.layers) == 1 else f"{layer.name}: {reason}"

    def _fault_of_ties(self) -> tuple[Layer, str] | None:
        """Return a layer that cannot be sharded because of a tied parameter, and the reason; sets `retied`."""
        users: dict[nn.Parameter, tuple[Replacement, str]] = {}
        replaced = {replacement.layer.module for replacement in self.replacements}
        for replacement in self.replacements:
            for old, _, name in replacement.parameters:
                first = users.setdefault(old, (replacement, name))
                if layout_of(*first) != layout_of(replacement, name):
                    other = first[0].layer.name
                    return replacement.layer, f"its {name} is that of {other}, which is sharded otherwise"
        self.retied = []
        for name, module in modules_with_own_parameters(self.model):
            for key, parameter in module._parameters.items():
                if module in replaced or parameter not in users:
                    continue
                if self._is_declared_tie(f"{name}.{key}".strip(".")) and parameter.dim() == 1:
                    self.retied.append((module, key))
                    continue
                layer = users[parameter][0].layer
                return layer, f"its {users[parameter][1]} is also that of {name or 'the model'}, which stays whole"
        return None

    def _is_declared_tie(self, name: str) -> bool:
        """Whether the model declares this name as tied (the bias of BERT's head has two names)."""
        ties = getattr(self.model, "_tied_weights_keys", None)
        return isinstance(ties, dict) and name in {*ties, *ties.values()}

    def _close_fast_paths(self) -> None:
        """Turn off the fast path of torch's encoder: in evaluation it takes the weights and calls its own kernel."""
        around = {layer.parent for layer in self._layers_to_replace()}
        layers = [m for n, m in self.model.named_modules() if n in around and isinstance(m, nn.TransformerEncoderLayer)]
        encoders = [m for m in self.model.modules() if isinstance(m, nn.TransformerEncoder)] if layers else []
        self.attributes += [(layer, "activation_relu_or_gelu", 0) for layer in layers]
        self.attributes += [(encoder, "use_nested_tensor", 0) for encoder in encoders]

    def _make_exchanges(self) -> None:
        replaced = {replacement.layer.module for replacement in self.replacements}
        summed = set(self.summed)
        for stack in self.stacks:
            in_stack = {module for layer in stack.layers for module in layer.modules()}
            gathered = {module for around in stack.gathering.values() for module in around.modules()}
            summed |= in_stack - gathered
        fused = find_exchanges(self.model)
        for name, module in named_once(self.model):
            if module in replaced:
                continue
            found = Exchange(name, module, type(module), {}) if type(module) in _SUMMED else fused.get(module)
            needs_sum = module in summed and module._parameters.get("weight") is not None
            if isinstance(found, Exchange):
                if needs_sum and group_size(self.tp_group) > 1 and found.drop_in in _SUMMED:
                    self.summed.pop(module, None)
                    attributes = {**found.attributes, "tp_group": self.tp_group, "sequence_parallel": True}
                    found = Exchange(name, module, _SUMMED[found.drop_in], attributes)
                if found.drop_in is not type(module):
                    self.exchanges.append(found)
            elif needs_sum and module not in self.summed:
                raise InputError(
                    f"sequence_parallel=True: {name} ({type(module).__name__}) is no norm whose gradient can be summed "
                    "(sequence_parallel=False shards the rest of this model)"
                )

    def _connect(self) -> None:
        """Give the parallel layers their shared inputs, and their region under sequence parallelism."""
        by_module = {replacement.layer.module: replacement.module for replacement in self.replacements}
        for unit in self.units:
            if unit.reason:
                continue
            stack = next((s for s in self.stacks if unit in s.units), None)
            entering = [by_module[layer.module] for layer in unit.entering]
            shared = None
            if len(entering) > 1 and group_size(self.tp_group) > 1:
                shared = SharedInput(self.tp_group, len(entering))
                self.shared.append((self.model.get_submodule(unit.parent), shared))
            for layer in unit.layers:
                module: Any = by_module.get(layer.module)
                if isinstance(module, ColumnLinear | GatheredLinear):
                    module.shared = shared
                if stack is not None and isinstance(module, ColumnLinear | GatheredLinear | RowLinear):
                    module.region = stack.region
                    module.gathered = unit.parent in stack.gathering
                    if layer.module in self.adapters:
                        self.adapters[layer.module].join(module)

        self._connect_heads(by_module)

    def _connect_heads(self, by_module: dict[nn.Module, Any]) -> None:
        """Mark the heads: gathering linears outside of all stacks. Losses of their logits need no gathering."""
        units = [unit for unit in self.units if not unit.reason and not unit.stack_layer]
        modules = [layer.module for unit in units for layer in unit.of("colwise_gather_output")]
        heads = [by_module[module] for module in modules]
        heads += [part for module in modules if module in self.adapters for part in self.adapters[module].heads]
        if heads and group_size(self.tp_group) > 1:
            self.scope = LogitsScope(self.gather_logits)
            for head in heads:
                head.scope = self.scope
        elif not self.gather_logits and group_size(self.tp_group) > 1:
            raise InputError(
                "gather_logits=False: the model has no head in shards (plan={its name: 'colwise_gather_output'} makes "
                "one; else leave gather_logits=True)"
            )

    def commit(self, shards: dict[nn.Parameter, nn.Parameter]) -> None:
        """Make the planned changes. No user input can make this fail."""
        exchange_all(self.exchanges)
        become_shards(self.replacements, shards)
        for module, name in self.retied:
            module._parameters[name] = kept(module._parameters[name], shards)  # type: ignore[arg-type]
        for replacement in self.replacements:
            for name in replacement.layer.paths:
                parent, _, child = name.rpartition(".")
                self.model.get_submodule(parent)._modules[child] = replacement.module
        self._commit_adapters()
        for module, attribute, value in self.attributes:
            setattr(module, attribute, value)
        for module, names in self.summed.items():
            SummedParameters(module, names, self.tp_group).install(self.users.get(module, []))
        for stack in self.stacks:
            stack.install()
        if self.stacks:
            self.model.register_forward_pre_hook(refuse_hidden_states, with_kwargs=True)
        guard_answers(self.model, any(self._is_cut_attention(unit) for unit in self.units))
        if self.scope is not None:
            for model in adapted_models(self.model):
                self.scope.install(model)
        for around, shared in self.shared:
            around.register_forward_hook(shared.release, always_call=True)

    def _commit_adapters(self) -> None:
        """Put the dropouts of adapters into the model; the wrappers will make later adapters in shards, too."""
        if not self.adapters:
            return
        from fused_megatron.interop.sharded_lora import ShardedLora  # noqa: PLC0415  PEFT is optional

        for layer in self.layers:
            if layer.module in self.adapters and layer.wrapper is not None:
                self.adapters[layer.module].exchange_dropouts()
                layer.wrapper.__class__ = ShardedLora

    def _is_cut_attention(self, unit: Unit) -> bool:
        parent = self.model.get_submodule(unit.parent) if not unit.reason and group_size(self.tp_group) > 1 else None
        return parent is not None and any(hasattr(parent, name) for name in (*HEAD_DIMS, *NUM_HEADS))

    def kept_whole(self) -> dict[str, str]:
        """Return, by layer name, why planned layers stay replicated."""
        return {**self.reasons, **{layer.name: u.reason for u in self.units if u.reason for layer in u.layers}}

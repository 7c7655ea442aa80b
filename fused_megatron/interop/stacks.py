"""Stacks of layers in a model, and checks that they can run on blocks of the sequence."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.interop.adapters import adapted_models
from fused_megatron.interop.known_layers import HEAD_DIMS, NUM_HEADS
from fused_megatron.interop.plans import COLUMN_STYLES
from fused_megatron.interop.sequence_region import SequenceRegion
from fused_megatron.interop.units import Unit, modules_with_own_parameters

_WAY_OUT = "(sequence_parallel=False shards the rest of this model)"


@dataclass
class Stack:
    """Layers that run one after the other.

    Attributes:
        name: name of the container of the layers.
        owner: the module whose forward runs the layers.
        layers: the layers, in order.
        region: their sequence parallelism.
        units: the sharded units inside the layers.
        gathering: by name, modules for which a hook gathers the sequence.
    """

    name: str
    owner: nn.Module
    layers: list[nn.Module]
    region: SequenceRegion
    units: list[Unit] = field(default_factory=list)
    gathering: dict[str, nn.Module] = field(default_factory=dict)

    def install(self) -> None:
        """Install the hooks of the region."""
        self.region.install(self.owner, self.layers[0], self.layers[-1])
        for module in self.gathering.values():
            self.region.install_gather(module)


def find_stacks(
    model: nn.Module, units: list[Unit], tp_group: Any, summed: set[nn.Module], adapters: set[nn.Module]
) -> list[Stack]:
    """Find the stacks with sharded units, for sequence parallelism.

    Args:
        model: the model.
        units: its units; replicated ones are skipped.
        tp_group: the tensor-parallel ranks.
        summed: modules whose gradients are summed over the ranks.
        adapters: modules of adapters beside sharded layers.

    Raises:
        InputError: there is no stack, or a layer in it would compute wrong gradients on a block of the sequence.
    """
    stacks: dict[str, Stack] = {}
    for unit in units:
        container_name = unit.stack_layer.rpartition(".")[0]
        if unit.reason or not unit.stack_layer or not (unit.of(*COLUMN_STYLES) or unit.of("rowwise_split_input")):
            continue
        container: Any = model.get_submodule(container_name)
        if container_name not in stacks:
            outer = container_name.rpartition(".")[0]
            owner = container if isinstance(container, nn.Sequential) else model.get_submodule(outer)
            owner = model if owner in adapted_models(model) else owner
            stacks[container_name] = Stack(container_name, owner, list(container.children()), SequenceRegion(tp_group))
        stacks[container_name].units.append(unit)
    if not stacks:
        raise InputError(
            f"sequence_parallel=True: no numbered stack of layers ('layers.0', ..) with sharded linears {_WAY_OUT}"
        )
    for stack in stacks.values():
        for unit in stack.units:
            _set_gathering(stack, unit, model)
        _check(stack, model, summed | adapters)
    return list(stacks.values())


def _set_gathering(stack: Stack, unit: Unit, model: nn.Module) -> None:
    """Decide whether the unit's linears gather the sequence, or a hook gathers it for the module around them.

    The hook serves attention, which reads the sequence length from its input, and several linears with one input, for
    which one gather is enough.
    """
    parent = model.get_submodule(unit.parent)
    counts_heads = any(hasattr(parent, name) for name in (*HEAD_DIMS, *NUM_HEADS))
    if len(unit.entering) == 1 and not counts_heads:
        return
    if unit.parent == unit.stack_layer:
        raise InputError(
            f"sequence_parallel=True: {unit.layers[0].name} and its neighbours stand in a layer, {unit.parent}, that "
            f"needs blocks of the sequence and the whole at once {_WAY_OUT}"
        )
    stack.gathering[unit.parent] = parent


def _check(stack: Stack, model: nn.Module, summed: set[nn.Module]) -> None:
    known = summed | {layer.module for unit in stack.units for layer in unit.layers}
    for name, module in modules_with_own_parameters(model):
        if not name.startswith(f"{stack.name}." if stack.name else "") or module in known:
            continue
        inside = next((g for g in stack.gathering if name.startswith(f"{g}.") or name == g), None)
        if inside is not None or not _is_summable_norm(module):
            where = f"inside {inside}" if inside is not None else "in a layer that would run on blocks of the sequence"
            raise InputError(
                f"sequence_parallel=True: {name} ({type(module).__name__}) stands {where}, where its gradient would "
                f"not be whole {_WAY_OUT}"
            )


def _is_summable_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return isinstance(weight, nn.Parameter) and weight.dim() == 1 and set(module._parameters) <= {"weight", "bias"}

"""Modules whose parameters are shards, and lookups in a model of such modules: its group, the parts of parameters."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.collectives import Group
from fused_megatron.sharding.parameter_record import ExpertRanks, Shard, mark_shard, parameter_parts
from fused_megatron.sharding.parameter_shard import ShardPart
from fused_megatron.sharding.replication import refuse_replication


class ShardedModule(nn.Module):
    """Module whose own parameters are shards, also after torch replaced their tensors.

    The module knows the shard of each parameter by name, and records it on the parameter. torch loses this record where
    it makes new tensors: in deepcopy, to_empty(), moves between devices, load_state_dict(assign=True), swap_tensors.
    The module marks the tensors whose replacement it sees. Code that reads the shards of a whole model calls
    mark_all_shards first.

    Attributes:
        tp_group: ranks that hold the other shards of dense parameters; None for this rank only.
        holds_experts: whether the own parameters of the module belong to experts (a class attribute).
        ep_group, etp_group: ranks that hold the other experts, and the other shards of the same experts; None for this
            rank only. A module that holds experts sets them before it registers a parameter.
        stored_shapes: by name of a parameter, the stored_shape of its record, if it has one.
    """

    tp_group: Any = None
    holds_experts: bool = False
    ep_group: Any = None
    etp_group: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.stored_shapes: dict[str, tuple[int, ...]] = {}
        self.shards: dict[str, Shard] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def register_shard(self, name: str, parameter: nn.Parameter, shard: Shard) -> None:
        """Register a parameter and mark it."""
        self.shards.pop(name, None)  # it may have another shape than the one before
        self.register_parameter(name, parameter)
        self.shards[name] = shard
        self._shapes[name] = tuple(parameter.shape)
        self.mark_shards()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as torch does; `module.weight = parameter` calls this, too.

        A parameter that replaces a shard is marked as this shard.

        Raises:
            InputError: the new parameter has another shape than the shard.
        """
        self._check_whole_names()
        shards = self.__dict__.get("shards", {})
        if name in shards and param is not None:
            self._check_shape(name, param)
        super().register_parameter(name, param)
        if name in shards and param is not None:
            mark_shard(param, shards[name], self._expert_ranks(), self.stored_shapes.get(name))

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__.get("shards", {}):
            raise InputError(_parametrised_shard(self, name))
        super().__delattr__(name)

    def mark_shards(self) -> None:
        """Mark the parameters that are registered now.

        Raises:
            InputError: a parametrisation replaced a parameter, or it has another shape than its shard.
        """
        self._check_whole_names()
        for name, shard in self.shards.items():
            parameter = self._parameters[name]
            if parameter is not None:  # a bias that was set to None
                self._check_shape(name, parameter)
                mark_shard(parameter, shard, self._expert_ranks(), self.stored_shapes.get(name))

    @property
    def part_groups(self) -> tuple[Group, ...]:
        """Groups of ranks that hold other parts of this module's own parameters."""
        return (self.ep_group, self.etp_group) if self.holds_experts else (self.tp_group,)

    def _expert_ranks(self) -> ExpertRanks | None:
        return ExpertRanks(self.ep_group, self.etp_group) if self.holds_experts else None

    def _check_shape(self, name: str, parameter: nn.Parameter) -> None:
        if tuple(parameter.shape) != self._shapes[name]:
            raise InputError(
                f"{type(self).__name__}.{name}: shape {tuple(parameter.shape)} must be {self._shapes[name]}, the shape "
                "of this rank's shard (full tensors: fused_megatron.load_full_state_dict)"
            )

    def _check_whole_names(self) -> None:
        gone = next((name for name in self.__dict__.get("shards", {}) if name not in self._parameters), None)
        if gone is not None:
            raise InputError(_parametrised_shard(self, gone))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.mark_shards()  # with assign, or torch.__future__'s swapping, it may be another tensor

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.mark_shards()
        return self

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters, as torch does.

        Raises:
            InputError: the caller is DistributedDataParallel or fully_shard over ranks that hold different shards.
        """
        for group in self.part_groups:
            refuse_replication(group, self.holds_experts)
        return super().named_parameters(*args, **kwargs)

    def __getstate__(self) -> Any:
        raise InputError(
            f"a {type(self).__name__} cannot be pickled, since it belongs to a group of running processes "
            "(save model.state_dict(), this rank's shards, or fused_megatron.full_state_dict(model))"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = copy_with_groups(self, (self.tp_group, self.ep_group, self.etp_group), memo)
        twin.mark_shards()
        return twin


def copy_with_groups(module: nn.Module, groups: Iterable[Group], memo: dict[int, Any]) -> Any:
    """Return a deep copy of a module that uses the same groups: a process group cannot be copied."""
    memo.update((id(group), group) for group in groups)
    twin = memo[id(module)] = type(module).__new__(type(module))
    twin.__dict__ = copy.deepcopy(module.__dict__, memo)
    return twin


def parallel_group(model: nn.Module) -> Group:
    """Return the group over which a model's dense layers are sharded; None if no layer is."""
    modules = (module for module in model.modules() if isinstance(module, ShardedModule))
    groups = (module.tp_group for module in modules if not module.holds_experts)
    return next((group for group in groups if group is not None), None)


def expert_ranks(model: nn.Module) -> ExpertRanks | None:
    """Return the ranks over which a model's experts are sharded; None for a model without experts."""
    found = (module._expert_ranks() for module in model.modules() if isinstance(module, ShardedModule))
    return next((ranks for ranks in found if ranks is not None), None)


def mark_all_shards(model: nn.Module) -> None:
    """Record on every parameter of a model the shard that its module knows, in place of any other record of it."""
    for module in model.modules():
        if isinstance(module, ShardedModule):
            module.mark_shards()


def parts_of_parameters(model: nn.Module) -> dict[nn.Parameter, tuple[ShardPart, ...]]:
    """Return parameter_parts of all parameters of a model, after marking them (mark_all_shards)."""
    mark_all_shards(model)
    return {parameter: parameter_parts(parameter) for parameter in model.parameters()}


def _parametrised_shard(module: nn.Module, name: str) -> str:
    return (
        f"{type(module).__name__}.{name} is a shard, which cannot be made of other parameters (weight_norm, "
        "spectral_norm, pruning and parametrizations see one rank's part only: leave this layer whole)"
    )

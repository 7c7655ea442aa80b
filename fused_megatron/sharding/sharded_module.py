"""Modules whose parameters are shards, and what a model of them knows: its group, the parts of its parameters."""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.collectives import Group
from fused_megatron.sharding.parameter_record import Shard, mark_shard, parameter_parts, shard_parts
from fused_megatron.sharding.parameter_shard import ShardPart


class ShardedModule(nn.Module):
    """A module whose own parameters are shards, and stay marked so when torch makes new ones of them.

    torch drops a parameter's attributes in deepcopy, to_empty() and some moves between devices.
    """

    tp_group: Any

    def __init__(self) -> None:
        super().__init__()
        self.shards: dict[str, Shard] = {}

    def register_shard(self, name: str, parameter: nn.Parameter, shard: Shard) -> None:
        """Register a parameter and mark it."""
        self.register_parameter(name, parameter)
        self.shards[name] = shard
        self.mark_shards()

    def mark_shards(self) -> None:
        """Mark the parameters that are registered now."""
        for name, shard in self.shards.items():
            mark_shard(self.get_parameter(name), shard)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.mark_shards()
        return self

    def __getstate__(self) -> Any:
        raise InputError(
            f"a {type(self).__name__} cannot be pickled, since it belongs to a group of running processes "
            "(save model.state_dict(), this rank's shards, or fused_megatron.full_state_dict(model))"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self.tp_group)] = self.tp_group  # a process group cannot be copied; both use the same
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        twin.mark_shards()
        return twin


def parallel_group(model: nn.Module) -> Group:
    """The group that a model's layers are sharded over; None where nothing is."""
    groups = (module.tp_group for module in model.modules() if isinstance(module, ShardedModule))
    return next((group for group in groups if group is not None), None)


def parts_of_parameters(model: nn.Module) -> dict[nn.Parameter, tuple[ShardPart, ...]]:
    """parameter_parts of all parameters of a model, as its modules know them: FSDP2's parameters lost their records."""
    shards = {
        module.get_parameter(name): shard
        for module in model.modules()
        if isinstance(module, ShardedModule)
        for name, shard in module.shards.items()
    }
    return {
        parameter: shard_parts(shards[parameter], tuple(parameter.shape))
        if parameter in shards
        else parameter_parts(parameter)
        for parameter in model.parameters()
    }

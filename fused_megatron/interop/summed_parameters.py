"""Replicated parameters that each rank uses with its own features only: their gradients are summed over the ranks."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fused_megatron.collectives import Group, identity_all_reduce_together


class SummedParameters:
    """Parameters between a colwise and a rowwise layer: the slope of an activation, the weight of a norm per head.

    While a module that uses them runs its forward, the parameters are those that went through
    identity_all_reduce_together. When backward() returns, their gradients are complete and the same on every rank.

    Args:
        owner: the module that holds the parameters. Its forward may never run: a ParameterDict, or a module that the
            model reads its numbers from.
        names: names of the owner's own parameters.
        tp_group: the tensor-parallel ranks.

    Communication: none in forward; one all-reduce of 4 bytes per element in backward, for each use.
    """

    def __init__(self, owner: nn.Module, names: Sequence[str], tp_group: Group) -> None:
        self.owner = owner
        self.names = tuple(names)
        self.tp_group = tp_group
        self._running = 0

    def install(self, users: Iterable[nn.Module]) -> None:
        """Install hooks on the owner, and on the modules whose forwards use the parameters."""
        for module in dict.fromkeys([self.owner, *users]):
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, always_call=True)

    @torch.compiler.disable(reason="a collective of fused_megatron")
    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running += 1
        if self._running > 1:  # the owner within a user
            return
        parameters = tuple(self.owner.get_parameter(name) for name in self.names)
        # Python finds plain attributes before the parameters of the same names.
        summed = identity_all_reduce_together(parameters, self.tp_group)
        self.owner.__dict__.update(zip(self.names, summed, strict=True))

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self._running = max(0, self._running - 1)
        for name in self.names if self._running == 0 else ():
            self.owner.__dict__.pop(name, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SummedParameters":
        twin = memo[id(self)] = copy.copy(self)
        twin.owner = copy.deepcopy(self.owner, memo)
        return twin

"""Parameters that ranks have in common and use with their own features or rows: gradients are summed over the ranks."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fused_megatron.collectives import Group, identity_all_reduce_together


class SummedParameters:
    """Parameters that each rank uses with its own features, or with its own rows of the sequence.

    Own features: between a colwise and a rowwise layer, as the slope of an activation or the weight of a norm per head.
    While a module that uses them runs its forward, the parameters are those that went through
    identity_all_reduce_together. When backward() returns, their gradients are complete and the same on every rank.
    Two of these, for two groups of ranks, may have the same owner: one is inside the other.

    Args:
        owner: the module that holds the parameters. Its forward may never run: a ParameterDict, or a module that the
            model reads its numbers from.
        names: names of the owner's own parameters.
        group: the ranks.

    Communication: none in forward; one all-reduce of 4 bytes per element in backward, for each use.
    """

    def __init__(self, owner: nn.Module, names: Sequence[str], group: Group) -> None:
        self.owner = owner
        self.names = tuple(names)
        self.group = group
        self._running = 0
        self._outer: dict[str, torch.Tensor] = {}

    def install(self, users: Iterable[nn.Module]) -> None:
        """Install hooks on the owner, and on the modules whose forwards use the parameters."""
        for module in dict.fromkeys([self.owner, *users]):
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, always_call=True, prepend=True)

    @torch.compiler.disable(reason="a collective of fused_megatron")
    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._running == 0 and not torch.is_grad_enabled():
            return
        self._running += 1
        if self._running > 1:  # the owner within a user
            return
        # Python finds plain attributes before the parameters of the same names.
        self._outer = {name: self.owner.__dict__[name] for name in self.names if name in self.owner.__dict__}
        parameters = tuple(getattr(self.owner, name) for name in self.names)
        summed = identity_all_reduce_together(parameters, self.group)
        self.owner.__dict__.update(zip(self.names, summed, strict=True))

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if self._running == 0:
            return
        self._running -= 1
        if self._running == 0:
            for name in self.names:
                self.owner.__dict__.pop(name, None)
            self.owner.__dict__.update(self._outer)
            self._outer = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "SummedParameters":
        twin = memo[id(self)] = copy.copy(self)
        twin.owner = copy.deepcopy(self.owner, memo)
        return twin

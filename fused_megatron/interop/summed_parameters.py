"""Replicated parameters that each rank uses with its own features only: their gradients are summed over the ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fused_megatron.collectives import Group, identity_all_reduce_together


class SummedParameters:
    """Hooks on a module between a colwise and a rowwise layer: an activation with a learned slope, a norm per head.

    During the module's forward, its parameters pass through identity_all_reduce_together. When backward() returns,
    their gradients are complete and the same on every rank.

    Args:
        names: names of the module's own parameters.
        tp_group: the tensor-parallel ranks.

    Communication: none in forward; one all-reduce of 4 bytes per element in backward.
    """

    def __init__(self, names: Sequence[str], tp_group: Group) -> None:
        self.names = tuple(names)
        self.tp_group = tp_group

    def install(self, module: nn.Module) -> None:
        """Install the hooks."""
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    @torch.compiler.disable(reason="a collective of fused_megatron")
    def _enter(self, module: nn.Module, args: Any) -> None:
        parameters = tuple(module.get_parameter(name) for name in self.names)
        # Python finds plain attributes before the parameters of the same names.
        module.__dict__.update(zip(self.names, identity_all_reduce_together(parameters, self.tp_group), strict=True))

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        for name in self.names:
            module.__dict__.pop(name, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SummedParameters":
        twin = memo[id(self)] = SummedParameters(self.names, self.tp_group)
        return twin

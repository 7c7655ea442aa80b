"""Parameters that a rank uses with its own features only: whole on every rank, their gradient summed over the ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fused_megatron.collectives import Group, identity_all_reduce_together


class SummedParameters:
    """Hooks on a module between a column and a row layer: an activation with a learned slope, a norm of single heads.

    In the module's forward its parameters are handed through identity_all_reduce_together, so that their gradients are
    whole, and the same on every rank, when backward() returns.

    Args:
        names: of the module's own parameters.
        tp_group: the ranks.

    Communication: none forward; one all-reduce of 4 bytes an element backward.
    """

    def __init__(self, names: Sequence[str], tp_group: Group) -> None:
        self.names, self.tp_group = tuple(names), tp_group

    def install(self, module: nn.Module) -> None:
        """Hook in."""
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    @torch.compiler.disable(reason="a collective of fused_megatron")
    def _enter(self, module: nn.Module, args: Any) -> None:
        parameters = tuple(module.get_parameter(name) for name in self.names)
        # Found before the parameters of these names, as plain attributes.
        module.__dict__.update(zip(self.names, identity_all_reduce_together(parameters, self.tp_group), strict=True))

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        for name in self.names:
            module.__dict__.pop(name, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SummedParameters":
        twin = memo[id(self)] = SummedParameters(self.names, self.tp_group)
        return twin

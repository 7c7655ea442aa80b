"""Faults of experts and of their routers, as contexts that plant a fault into this process; see fault_plants.py."""

from typing import Any
from unittest.mock import patch

import torch

from fused_megatron.collectives import group_size
from fused_megatron.collectives.transfers import Transfer
from fused_megatron.expert_parallel import all_to_all
from fused_megatron.models import mixture_of_experts, router
from fused_megatron.testing.fault_plants import Planted


def expert_gradients_too_large() -> Planted:
    """Gradients of experts grow with the number of ranks that share the experts."""
    original = all_to_all.SentTokens.arrive_back

    def arrive_back(self: all_to_all.SentTokens, part: int, dy: torch.Tensor) -> torch.Tensor:
        return original(self, part, dy) * group_size(self._ep_group)

    return patch.object(all_to_all.SentTokens, "arrive_back", arrive_back)


def tokens_of_two_ranks_swapped() -> Planted:
    """Each rank sends the rows for its own experts to another rank, and the rows of that rank's to its own."""
    original = all_to_all.SentTokens.__init__

    def init(self: all_to_all.SentTokens, *arguments: Any) -> None:
        first = all_to_all._own_first
        with patch.object(all_to_all, "_own_first", lambda size, own: first(size, own)[::-1]):
            original(self, *arguments)

    return patch.object(all_to_all.SentTokens, "__init__", init)


def loads_of_own_positions() -> Planted:
    """The balance loss counts the loads of one context-parallel rank's positions."""

    def unsummed(x: torch.Tensor, group: Any) -> Transfer:
        return Transfer((), (x,))

    return patch.object(mixture_of_experts, "start_all_reduce_", unsummed)


def router_gradient_not_summed() -> Planted:
    """Each tensor-parallel rank keeps the router's gradient of its own tokens."""
    return patch.object(router, "used_by_parts", lambda tensors, group: tensors)

"""Size of a process group and this rank's index in it; None is the group of this rank only."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import forward_ad

from fused_megatron.checks import InputError
from fused_megatron.ops.autograd_function import AutogradFunction, transform_is_active

Group = dist.ProcessGroup | None
"""Ranks that work together; None is this rank only."""


def group_size(group: Group) -> int:
    """Return the number of ranks in group; 1 for None.

    Raises:
        InputError: this rank is not in the group (torch hands such ranks a placeholder).
    """
    return 1 if group is None else _member(group).size()


def group_rank(group: Group) -> int:
    """Return the index of this rank in group; 0 for None. Raises as group_size."""
    return 0 if group is None else _member(group).rank()


def is_fake(group: Group) -> bool:
    """Whether the group has torch's "fake" backend, without other ranks, whose collectives do nothing."""
    return group is not None and dist.get_backend(group) == dist.Backend.FAKE


def on_ranks(function: type[AutogradFunction], group: Group) -> Callable[..., Any]:
    """Return function.apply, for a function with collectives over group: on_ranks(Function, group)(*args).

    torch.compile breaks its graph at the call: it cannot trace a collective that runs beside a product, and would lose
    their order. For a group of one rank the function is traced.
    """
    if torch.compiler.is_compiling():
        return function.apply if group_size(group) == 1 else partial(_between_graphs, function)
    if transform_is_active() or forward_ad._current_level >= 0:
        return function.apply  # raises the error that names the transform
    return function.apply_untransformed


@torch._disable_dynamo  # torch.compiler.disable, without the seconds that importing torch._dynamo takes
def _between_graphs(function: type[AutogradFunction], *args: Any) -> Any:
    return function.apply(*args)


def _member(group: dist.ProcessGroup) -> dist.ProcessGroup:
    if not isinstance(group, dist.ProcessGroup):
        rank = dist.get_rank() if dist.is_initialized() else 0
        raise InputError(
            f"group={group!r} does not contain this rank {rank} (pass the group that init_mesh made for this rank)"
        )
    return group

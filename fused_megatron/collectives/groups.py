"""Size of a group and this rank's place in it; None is the group of this rank alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from fused_megatron.checks import InputError

Group = dist.ProcessGroup | None
"""Ranks that work together; None is this rank alone."""


def group_size(group: Group) -> int:
    """Number of ranks in group; 1 for None.

    Raises:
        InputError: this rank is not in the group (torch hands such ranks a placeholder).
    """
    return 1 if group is None else _member(group).size()


def group_rank(group: Group) -> int:
    """This rank's position in group; 0 for None. Raises as group_size."""
    return 0 if group is None else _member(group).rank()


def on_ranks(function: type[torch.autograd.Function], group: Group) -> Callable[..., Any]:
    """function.apply, for a function that talks to the ranks of group: on_ranks(Function, group)(*args).

    torch.compile breaks its graph there: it cannot trace a collective that is under way while a product runs, and the
    order of the two is what these functions are about. Alone, with nobody to talk to, the function is traced.
    """
    if torch.compiler.is_compiling() and group_size(group) > 1:
        return partial(_between_graphs, function)
    return function.apply


@torch.compiler.disable
def _between_graphs(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)


def _member(group: dist.ProcessGroup) -> dist.ProcessGroup:
    if not isinstance(group, dist.ProcessGroup):
        rank = dist.get_rank() if dist.is_initialized() else 0
        raise InputError(
            f"group={group!r} does not contain this rank {rank} (pass the group that init_mesh made for this rank)"
        )
    return group

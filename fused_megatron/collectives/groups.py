"""Size of a group and this rank's place in it; None is the group of this rank alone."""

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


def _member(group: dist.ProcessGroup) -> dist.ProcessGroup:
    if not isinstance(group, dist.ProcessGroup):
        rank = dist.get_rank() if dist.is_initialized() else 0
        raise InputError(
            f"group={group!r} does not contain this rank {rank} (pass the group that init_mesh made for this rank)"
        )
    return group

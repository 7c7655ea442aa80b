"""Start here when a group has the wrong size or rank, or None is not the group of one rank."""

import pytest
import torch.distributed as dist

from fused_megatron.checks import InputError
from fused_megatron.collectives import group_rank, group_size
from fused_megatron.testing import run_on_ranks


def in_a_group_of_two(rank, world_size):
    group = dist.new_group([0, 2])
    if rank == 1:
        with pytest.raises(InputError, match="does not contain this rank 1") as info:
            group_size(group)
        assert str(info.value)
        with pytest.raises(InputError, match="does not contain this rank 1"):
            group_rank(group)
        return None
    return group_size(group), group_rank(group)


def test_none_is_this_rank_only():
    assert (group_size(None), group_rank(None)) == (1, 0)


def test_members_and_others():
    assert run_on_ranks(in_a_group_of_two, 3) == [(2, 0), None, (2, 1)]

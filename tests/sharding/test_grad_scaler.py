"""Start here when some ranks step with GradScaler and others skip."""

import pytest
import torch
from torch import nn

import fused_megatron as fm
from fused_megatron.testing import run_on_ranks


def steps(rank, world_size):
    """Return for each kind of step (scale after it, whether the weight changed); rank 1 has an infinity."""
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    found = {}
    for name, fused, bad_rank in (("plain", False, 1), ("fused", True, 1), ("finite", False, None), ("none", False, 1)):
        weight = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.1, fused=fused)
        scaler = fm.GradScaler(mesh, "cpu", init_scale=4.0, growth_interval=1)
        if name != "none" or rank == bad_rank:  # rank 0 has no gradient at all
            scaler.scale((weight * (torch.inf if rank == bad_rank else 1.0)).sum()).backward()
        else:
            scaler.scale(torch.zeros(()))
        if name == "plain":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        found[name] = scaler.get_scale(), bool((weight != 1).any())
    return found


def test_ranks_skip_a_step_together():
    for found in run_on_ranks(steps, 2):
        assert found == {"plain": (2.0, False), "fused": (2.0, False), "finite": (8.0, True), "none": (2.0, False)}


def test_one_rank_equals_torch():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = fm.GradScaler(None, "cpu", init_scale=4.0)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))
    assert not fm.GradScaler(None, "cpu", enabled=False).is_enabled()
    with pytest.raises(TypeError, match=r"mesh=str must be what fused_megatron.init_mesh returns, or a group"):
        fm.GradScaler("cuda")

"""Start here when the gradient of a parameter is summed over one axis of ranks but not over another."""

import copy

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.interop.summed_parameters import SummedParameters
from fused_megatron.testing import run_on_ranks


def sums_over_two_axes(rank, world_size):
    """Return the gradients of a module whose parameters are summed twice, and of its copy."""
    module = nn.Linear(2, 1)
    for _ in range(2):
        SummedParameters(module, ["weight", "bias"], dist.group.WORLD).install([])
    found = []
    for one in (module, copy.deepcopy(module)):
        one(torch.ones(1, 2)).sum().backward()
        assert "weight" not in one.__dict__ and isinstance(one.weight, nn.Parameter)
        found.append(one.weight.grad.tolist())
    return found


def test_each_takes_the_tensor_of_the_one_before_and_puts_it_back():
    for gradient, of_copy in run_on_ranks(sums_over_two_axes, 2):
        assert gradient == of_copy == [[4.0, 4.0]]

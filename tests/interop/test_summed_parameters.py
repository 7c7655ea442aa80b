"""Start here when a parameter whose gradient is summed over ranks keeps a tensor of a forward that has ended."""

import copy

import torch
from torch import nn

from fused_megatron.interop.summed_parameters import SummedParameters


def test_sums_over_two_axes_leave_the_module_as_it_was():
    """Each takes the tensor that the one before it made, and puts it back."""
    module = nn.Linear(2, 2)
    for _ in range(2):
        SummedParameters(module, ["weight", "bias"], None).install([])
    twin = copy.deepcopy(module)
    for one in (module, twin):
        one(torch.ones(1, 2)).sum().backward()
        assert "weight" not in one.__dict__ and isinstance(one.weight, nn.Parameter)
    assert torch.equal(twin.weight.grad, module.weight.grad)

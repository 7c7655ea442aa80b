"""Start here when tensor-parallel ranks get other samples, and the model mixes them without an error."""

import copy

import pytest
import torch
from torch import nn

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.testing import run_on_ranks

PLAN = {"1": "colwise_gather_output"}


def others(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    torch.manual_seed(0)
    fresh = fm.parallelize(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6)), mesh, PLAN)
    plain = fm.parallelize(nn.Sequential(nn.Identity(), nn.Linear(4, 6)), mesh, PLAN)
    message = r"tensor-parallel ranks \[1\] have other inputs than rank 0: .*mesh.dp_rank of mesh.dp_size"
    inputs = {
        "samples": (fresh, torch.tensor([[1, 2, rank]])),
        "lengths": (fresh, torch.zeros(1, 3 + rank, dtype=torch.int64)),
        "values": (plain, torch.full((2, 4), 1.0 + rank)),
    }
    for training in (True, False):
        for model, x in inputs.values():
            with pytest.raises(InputError, match=message):
                copy.deepcopy(model).train(training)(x)
    # A rounding difference of a layer before the model is none.
    plain.train()(torch.full((2, 4), 1.0 + 1e-3 * rank))
    fresh.train()(torch.tensor([[1, 2, 3]]))
    with pytest.raises(InputError, match=message):
        fresh.eval()(torch.tensor([[1, 2, rank]]))


def test_other_inputs_are_an_error_on_every_rank():
    run_on_ranks(others, 2)

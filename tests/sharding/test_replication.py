"""Start here when DistributedDataParallel is accepted over different shards, or refused over equal ones."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig
from fused_megatron.interop import full_tensor
from fused_megatron.models import GPT
from fused_megatron.tensor_parallel import ColumnParallelLinear
from fused_megatron.testing import run_on_ranks


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))


PLAN = {"0": "colwise", "2": "rowwise"}


def around_shards(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "seq_len": 4, "vocab_size": 10}
    models = {
        "parallelize": fm.parallelize(mlp(), mesh, PLAN),
        "inside of another": nn.Sequential(fm.parallelize(mlp(), mesh, PLAN)),
        "GPT": GPT(GPTConfig(**sizes), layout=mesh.layout(), seed=1),
        "a layer of ours": nn.Sequential(ColumnParallelLinear(4, 6, tp_group=mesh.tp_group)),
    }
    for name, model in models.items():
        before = copy.deepcopy(fm.full_state_dict(model))
        message = r"DistributedDataParallel over ranks \[0, 1\] would take the shards of tensor-parallel ranks \[0, 1\]"
        for options in ({}, {"init_sync": False}, {"process_group": torch.distributed.group.WORLD}):
            with pytest.raises(InputError, match=message):
                DistributedDataParallel(model, **options)
        with pytest.raises(InputError, match=r"fully_shard over ranks \[0, 1\].*mesh=mesh.device_mesh\['dp'\]"):
            fully_shard(copy.deepcopy(model))
        replicated = replicate(copy.deepcopy(model))
        with pytest.raises(InputError, match=r"replicate over ranks \[0, 1\].*process_group=mesh.dp_group"):
            replicated(torch.zeros(1, 8, dtype=torch.int64 if name == "GPT" else torch.float32))
        after = fm.full_state_dict(model)
        assert all(torch.equal(value, after[key]) for key, value in before.items()), name
    alone = fm.parallelize(mlp(), None, PLAN)
    assert DistributedDataParallel(alone)(torch.zeros(1, 8)).shape == (1, 8)


def test_ranks_with_other_shards_are_refused():
    run_on_ranks(around_shards, 2)


def over_data_parallel_ranks(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=2)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    original = mlp()
    (original(x) ** 2).mean().backward()
    parallel = fm.parallelize(mlp(), mesh, PLAN)
    model = DistributedDataParallel(parallel, process_group=mesh.dp_group)
    (model(x.chunk(2)[mesh.dp_rank]) ** 2).mean().backward()
    for mine, theirs in zip(parallel.parameters(), original.parameters(), strict=True):
        whole = full_tensor(mine, mine.grad, mesh.tp_group)
        torch.testing.assert_close(whole, theirs.grad, rtol=1e-5, atol=1e-6)


def test_over_data_parallel_ranks_it_is_right():
    run_on_ranks(over_data_parallel_ranks, 4)

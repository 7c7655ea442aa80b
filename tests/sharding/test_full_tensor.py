"""Start here when a gathered tensor differs from the full one, or a rank cuts the wrong shard from it."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.mesh import init_mesh
from fused_megatron.sharding import (
    ExpertRanks,
    ParameterShard,
    ShardPart,
    copy_shard_,
    full_numel,
    full_shape,
    full_tensor,
    mark_shard,
)
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks, run_on_ranks

H = 3


def parameters(rank, ranks):
    """Make a vocabulary whose last ranks have padding only, a stack with copies, columns, a vector, a number."""
    copies = ranks // 2 or 1
    key = ParameterShard((4, H), (rank // copies * 4 * copies // ranks, 0), copy=rank % copies)
    rows = 8 // ranks
    stack = (
        ShardPart("query", slice(0, rows), ParameterShard((8, H), (rank * rows, 0))),
        ShardPart("key", slice(rows, rows + 4 * copies // ranks), key),
    )
    shards = {
        "vocabulary": ((16 // ranks, H), ParameterShard((7, H), (rank * 16 // ranks, 0))),
        "stack": ((rows + 4 * copies // ranks, H), stack),
        "columns": ((H, 8 // ranks), ParameterShard((H, 8), (0, rank * 8 // ranks))),
        "whole": ((H,), None),
        "number": ((), None),
    }
    made = {}
    for name, (shape, shard) in shards.items():
        made[name] = nn.Parameter(torch.full(shape, torch.nan))
        if shard is not None:
            mark_shard(made[name], shard)
    return made


def there_and_back(rank, ranks):
    group = dist.group.WORLD if ranks > 1 else None
    for transposed in (False, True):
        for name, parameter in parameters(rank, ranks).items():
            shape = full_shape(parameter, transposed)
            full = torch.arange(1.0, 1 + full_numel([parameter])).view(shape)
            copy_shard_(parameter, full, transposed)
            assert not parameter.isnan().any(), name
            whole = full_tensor(parameter, parameter, group, transposed)
            assert torch.equal(whole, full) and whole.is_contiguous(), (name, transposed)
            assert whole.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr(), name
    vocabulary = parameters(rank, ranks)["vocabulary"]
    copy_shard_(vocabulary, torch.ones(7, H))
    assert int(vocabulary.sum()) == H * max(0, min(16 // ranks, 7 - rank * 16 // ranks))  # padding is 0


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_full_tensor_cut_and_gathered_is_the_same(ranks):
    run_on_ranks(there_and_back, ranks)


def experts_there_and_back(rank, ranks, ep, etp):
    """Four experts of a gate and an up matrix, and of a bias that is whole on the ranks of an expert."""
    mesh = init_mesh(expert_parallel_size=ep, expert_tensor_parallel_size=etp)
    groups = ExpertRanks(mesh["ep"].group, mesh["etp"].group)
    rows, first = 8 // etp, groups.ep_rank * 4 // ep
    names = [f"{e}.{kind}" for e in range(first, first + 4 // ep) for kind in ("gate", "up")]
    offset = mesh["etp"].rank * rows
    gated = [ParameterShard((8, H), (offset, 0)) for _ in names]
    biases = [ParameterShard((H,), (0,), replicated=True) for _ in names]
    for size, shape, shards in ((rows, (H,), gated), (H, (), biases)):
        pairs = enumerate(zip(names, shards, strict=True))
        parts = [ShardPart(name, slice(i * size, (i + 1) * size), shard) for i, (name, shard) in pairs]
        parameter = nn.Parameter(torch.full((len(names) * size, *shape), torch.nan))
        mark_shard(parameter, tuple(parts), groups)
        assert full_shape(parameter) == (8 * (8 if shape else H), *shape)
        full = torch.arange(1.0, 1 + full_numel([parameter])).view(full_shape(parameter))
        copy_shard_(parameter, full)
        assert not parameter.isnan().any()
        assert torch.equal(full_tensor(parameter, parameter, None), full)


def test_experts_cut_and_gathered_are_the_same():
    run_cases_on_ranks(experts_there_and_back, 4, [(1, 1), (4, 1), (2, 2), (1, 4), (2, 1)])


def test_full_shapes():
    shapes = {name: full_shape(parameter) for name, parameter in parameters(1, 4).items()}
    assert shapes == {"vocabulary": (7, H), "stack": (12, H), "columns": (H, 8), "whole": (H,), "number": ()}
    assert full_shape(parameters(1, 4)["columns"], transposed=True) == (8, H)
    assert full_numel(parameters(1, 4).values()) == 7 * H + 12 * H + H * 8 + H + 1

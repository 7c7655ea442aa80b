"""Start here when a rank holds the wrong rows of query, key and value."""

import copy

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.mesh import init_mesh
from fused_megatron.tensor_parallel import OutputPart, StackedColumnParallelLinear, parameter_parts, parameter_shard
from fused_megatron.testing.run_on_ranks import run_on_ranks

PARTS = [OutputPart("query", 12), OutputPart("key", 4, copies=2)]


def places(rank: int, world_size: int) -> list[tuple[str, int, int, tuple[int, ...], tuple[int, ...], int]]:
    layer = StackedColumnParallelLinear(8, PARTS, tp_group=init_mesh(world_size).tp_group)
    twin = copy.deepcopy(layer).to(torch.float64)
    assert parameter_parts(twin.weight) == parameter_parts(layer.weight)
    return [
        (part.name, part.rows.start, part.rows.stop, part.shard.full_shape, part.shard.offset, part.shard.copy)
        for part in (*parameter_parts(layer.weight), *parameter_parts(layer.bias))
    ]


def test_neighbouring_ranks_hold_the_copies_of_a_part() -> None:
    for rank, found in enumerate(run_on_ranks(places, 4)):
        key = 2 * (rank // 2)
        assert found == [
            ("query", 0, 3, (12, 8), (3 * rank, 0), 0),
            ("key", 3, 5, (4, 8), (key, 0), rank % 2),
            ("query", 0, 3, (12,), (3 * rank,), 0),
            ("key", 3, 5, (4,), (key,), rank % 2),
        ]


def test_one_rank_equals_torch_and_weights_come_from_the_names_of_the_parts() -> None:
    layer = StackedColumnParallelLinear(8, [OutputPart("gate", 6), OutputPart("up", 6)], tp_group=None)
    layer.reset_parameters(3, "mlp.weight")
    alone = StackedColumnParallelLinear(8, [OutputPart("up", 6)], tp_group=None)
    alone.reset_parameters(3, "mlp.weight")
    assert torch.equal(layer.weight[6:], alone.weight) and not torch.equal(layer.weight[:6], alone.weight)
    x = torch.randn(5, 2, 8)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.out_features == 12


def test_bad_input() -> None:
    with pytest.raises(InputError, match="tensor_parallel_size=1 must be divisible by copies of key=2"):
        StackedColumnParallelLinear(8, PARTS, tp_group=None)
    layer = StackedColumnParallelLinear(8, PARTS[:1], tp_group=None)
    with pytest.raises(InputError, match=r"the parameter stacks \['query'\]: see parameter_parts"):
        parameter_shard(layer.weight)

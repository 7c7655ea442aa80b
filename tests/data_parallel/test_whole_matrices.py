"""Start here when a rank computes a matrix that is put together wrongly, or gets another part of the result."""

import torch
from torch import nn

from fused_megatron.data_parallel.whole_matrices import WholeMatrices
from fused_megatron.mesh import init_mesh
from fused_megatron.sharding import ParameterShard, RowShards, ShardPart, mark_shard
from fused_megatron.testing.run_on_ranks import run_on_ranks

SHAPES = {"a": (6, 4), "b.query": (4, 3), "b.key": (2, 3), "c": (4, 10), "d": (1, 5)}
FULL = {name: torch.arange(10.0 * i, 10.0 * i + m * n).view(m, n) for i, (name, (m, n)) in enumerate(SHAPES.items())}


def sharded(tp_rank: int) -> dict[str, nn.Parameter]:
    """Of two tensor-parallel ranks: rows of a; rows of b's query and a copy of its key; columns of c; d whole."""
    query = ShardPart("query", slice(0, 2), ParameterShard((4, 3), (2 * tp_rank, 0)))
    key = ShardPart("key", slice(2, 4), ParameterShard((2, 3), (0, 0), copy=tp_rank))
    shards = {
        "a": (ParameterShard((6, 4), (3 * tp_rank, 0)), FULL["a"][3 * tp_rank :][:3]),
        "b": ((query, key), torch.cat([FULL["b.query"][2 * tp_rank :][:2], FULL["b.key"]])),
        "c": (ParameterShard((4, 10), (0, 5 * tp_rank)), FULL["c"][:, 5 * tp_rank :][:, :5]),
        "d": (None, FULL["d"]),
    }
    found = {}
    for name, (shard, values) in shards.items():
        found[name] = nn.Parameter(values.clone())
        if shard is not None:
            mark_shard(found[name], shard)
    return found


def check_exchange(rank: int, world_size: int) -> tuple[list[str], int]:
    """Check every part of the results; return the matrices that this rank computed, and the number of all."""
    mesh = init_mesh(tensor_parallel_size=2)
    parameters, rows = sharded(mesh.tp_rank), RowShards(mesh.dp_size, mesh.dp_rank)
    matrices = WholeMatrices(parameters, rows, mesh["dp", "tp"].group, 2)
    own = {name: rows.own(parameter.detach()) for name, parameter in parameters.items()}
    computed: list[str] = []

    def function(whole: torch.Tensor) -> torch.Tensor:
        computed.append(next(name for name, full in FULL.items() if torch.equal(full, whole)))
        return -whole.t().contiguous().t()

    covered = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    for matrix, part in matrices.map(lambda m: own[m.name][m.rows], function, torch.empty(0)):
        assert torch.equal(part, -own[matrix.name][matrix.rows])
        covered[matrix.name][matrix.rows] += 1
    assert all(bool((count == 1).all()) for count in covered.values())
    return computed, len(matrices.matrices)


def test_every_matrix_is_computed_once_and_whole_and_the_work_is_shared() -> None:
    for world_size in (2, 6):  # three row shards: some ranks hold nothing of a matrix
        found = run_on_ranks(check_exchange, world_size)
        names = sorted(name for computed, _ in found for name in computed)
        assert names == sorted(SHAPES)
        assert max(len(computed) for computed, _ in found) == -(-len(SHAPES) // world_size)
        assert {total for _, total in found} == {len(SHAPES)}

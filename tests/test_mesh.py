"""Start here when a rank is in the wrong group, or the order of ranks changes."""

import dataclasses
import itertools
import os
import types
import warnings

import pytest
import torch
import torch.distributed as dist

from fused_megatron import mesh as mesh_module
from fused_megatron.checks import InputError
from fused_megatron.mesh import AXES, coordinates, init_mesh
from fused_megatron.testing import run_cases_on_ranks, run_on_ranks


def where_am_i(rank, world_size, sizes):
    mesh = init_mesh(*sizes)
    assert (mesh.rank, mesh.world_size) == (rank, world_size)
    members = {}
    for axis in ("pp", "dp", "tp"):
        group, size = getattr(mesh, f"{axis}_group"), getattr(mesh, f"{axis}_size")
        members[axis] = [rank]
        assert (group is None) == (size == 1)
        if group is not None:
            assert group.size() == size and group.rank() == getattr(mesh, f"{axis}_rank")
            assert group is mesh.device_mesh.get_group(axis)
            gathered = torch.empty(size, dtype=torch.int64)
            dist.all_gather_single(gathered, torch.tensor([rank]), group=group)
            members[axis] = gathered.tolist()
    with pytest.raises(dataclasses.FrozenInstanceError):
        mesh.rank = 3
    return (mesh.pp_rank, mesh.dp_rank, mesh.tp_rank), members


def refused(rank, world_size, sizes):
    with pytest.raises(InputError) as info:
        init_mesh(*sizes)
    return str(info.value)


@pytest.mark.parametrize(
    ("world_size", "shapes"),
    [
        (1, {(): (1, 1, 1)}),
        (3, {(3,): (1, 1, 3)}),
        (4, {(2,): (1, 2, 2), (1, 4): (4, 1, 1), (): (1, 4, 1)}),
        (6, {(3, 2, 1): (2, 1, 3)}),
        (8, {(2, 2): (2, 2, 2)}),
    ],
)
def test_grid(world_size, shapes):
    found = run_cases_on_ranks(where_am_i, world_size, [(sizes,) for sizes in shapes])
    for (pp, dp, tp), by_rank in zip(shapes.values(), found, strict=True):
        grid = torch.arange(world_size).view(pp, dp, tp)
        for rank, (place, members) in enumerate(by_rank):
            p, d, t = place
            assert grid[p, d, t] == rank
            assert members == {"pp": grid[:, d, t].tolist(), "dp": grid[p, :, t].tolist(), "tp": grid[p, d].tolist()}


def test_rank_order():
    sizes = {"pp": 2, "dp": 3, "cp": 2, "tp": 4}
    grid = itertools.product(*(range(sizes[axis]) for axis in AXES))
    for rank, (pp, dp, cp, tp) in enumerate(grid):
        assert coordinates(rank, sizes) == {"pp": pp, "dp": dp, "cp": cp, "tp": tp}
        assert ((pp * 3 + dp) * 2 + cp) * 4 + tp == rank


def members_of(sub_mesh):
    if sub_mesh.group is None:
        assert (sub_mesh.size, sub_mesh.rank) == (1, 0)
        return [dist.get_rank()]
    assert (sub_mesh.group.size(), sub_mesh.group.rank()) == (sub_mesh.size, sub_mesh.rank)
    gathered = torch.empty(sub_mesh.size, dtype=torch.int64)
    dist.all_gather_single(gathered, torch.tensor([dist.get_rank()]), group=sub_mesh.group)
    return gathered.tolist()


def sub_meshes(rank, world_size, sizes, names):
    mesh = init_mesh(**sizes)
    assert mesh["tp"].group is mesh.tp_group and mesh["dp"].group is mesh.dp_group
    return [members_of(mesh[name]) for name in names]


def test_named_axes_and_experts_folded_over_them():
    sizes = {"tensor_parallel_size": 2, "context_parallel_size": 2, "data_parallel_size": 2, "expert_parallel_size": 4}
    names = ["tp", "cp", "dp", ("dp", "cp"), ("cp", "tp"), ("dp", "cp", "tp"), "ep", "etp", "edp", ("edp", "ep")]
    grid, experts = torch.arange(8).view(2, 2, 2), torch.arange(8).view(2, 4)
    for rank, found in enumerate(run_on_ranks(sub_meshes, 8, sizes, names)):
        d, c, t = (int(i) for i in (grid == rank).nonzero()[0])
        copy, group = divmod(rank, 4)
        expected = [
            grid[d, c], grid[d, :, t], grid[:, c, t], grid[:, :, t].flatten(), grid[d].flatten(), grid.flatten(),
            experts[copy], torch.tensor([rank]), experts[:, group], experts.flatten(),
        ]  # fmt: skip
        assert found == [members.tolist() for members in expected]


def states(rank, world_size, shard_size):
    mesh = init_mesh(context_parallel_size=2, tensor_parallel_size=2)
    shards, copies = mesh.split_data_parallel(shard_size)
    return [members_of(each) for each in (shards, copies, mesh.replicas, mesh.ranks_of_a_state(shard_size))]


def test_data_and_context_parallel_ranks_share_a_state():
    """Grid of dp 2, cp 2, tp 2: the replicas of a rank are all ranks with its tp rank."""
    whole, halves = run_cases_on_ranks(states, 8, [(4,), (2,)])
    for rank in range(8):
        tp, half = rank % 2, rank // 4 * 4
        replicas = [tp, tp + 2, tp + 4, tp + 6]
        assert whole[rank] == [replicas, [rank], replicas, list(range(8))]
        shards, copies = [half + tp, half + tp + 2], sorted([rank, (rank + 4) % 8])
        assert halves[rank] == [shards, copies, replicas, list(range(half, half + 4))]


def states_of_experts(rank, world_size, sizes, shard_size):
    mesh = init_mesh(context_parallel_size=2, tensor_parallel_size=2, **sizes)
    shards, copies = mesh.split_data_parallel(shard_size, of_experts=True)
    state = mesh.ranks_of_a_state(shard_size, of_experts=True)
    return [members_of(each) for each in (shards, copies, mesh.expert_replicas, state)]


def test_ranks_with_the_same_experts_share_a_state():
    """Grid of dp 2, cp 2, tp 2: experts that are whole, on 4 ranks, and on 2 ranks as dense layers are."""
    cases = [({}, 4), ({"expert_tensor_parallel_size": 4}, 2), ({"expert_parallel_size": 2}, 2)]
    whole, quarters, halves = run_cases_on_ranks(states_of_experts, 8, cases)
    for rank in range(8):
        four, half, tp = rank // 4 * 4, sorted([rank, (rank + 4) % 8]), rank % 2
        assert whole[rank] == [list(range(four, four + 4)), half, list(range(8)), list(range(four, four + 4))]
        assert quarters[rank] == [half, [rank], half, list(range(8))]
        shards, replicas = [four + tp, four + tp + 2], [tp, tp + 2, tp + 4, tp + 6]
        assert halves[rank] == [shards, half, replicas, shards]


def test_wrong_names_of_axes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    mesh = init_mesh()
    assert (mesh["tp"].size, mesh["dp", "cp"].rank, mesh["ep"].group) == (1, 0, None)
    with pytest.raises(InputError, match="axis='sp' must be one of: 'pp', 'dp', 'cp', 'tp'"):
        mesh["sp"]
    for axes in (("tp", "dp"), ("ep", "tp"), ()):
        with pytest.raises(InputError, match="in this order"):
            mesh[axes]


def test_experts_that_do_not_fold():
    message = "expert_parallel_size=3 x expert_tensor_parallel_size=1 = 3 must divide the 2 ranks of a pipeline stage"
    found = run_on_ranks(refused_by_name, 2, {"expert_parallel_size": 3})
    assert all(text.startswith(message) for text in found)


def refused_by_name(rank, world_size, sizes):
    with pytest.raises(InputError) as info:
        init_mesh(**sizes)
    return str(info.value)


WRONG_SIZES = {
    (2, 1, 2): "tensor_parallel_size=2 x pipeline_parallel_size=1 x data_parallel_size=2 = 4 must equal the world size "
    "2 (start 4 ranks: torchrun or fused-megatron launch, with --nproc-per-node 4; or data_parallel_size=1)",
    (3,): "tensor_parallel_size=3 x pipeline_parallel_size=1 x data_parallel_size=1 = 3 must equal the world size "
    "2 (start 3 ranks: torchrun or fused-megatron launch, with --nproc-per-node 3)",
    (0,): "tensor_parallel_size=0 must be at least 1",
    (1, -1): "pipeline_parallel_size=-1 must be at least 1",
}


def test_wrong_sizes():
    found = run_cases_on_ranks(refused, 2, [(sizes,) for sizes in WRONG_SIZES])
    assert found == [[message, message] for message in WRONG_SIZES.values()]


def test_one_process_without_process_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    mesh = init_mesh()
    assert (mesh.tp_size, mesh.pp_size, mesh.dp_size, mesh.world_size, mesh.rank) == (1, 1, 1, 1, 0)
    assert mesh.tp_group is None and mesh.dp_group is None and mesh.pp_group is None and mesh.device_mesh is None
    with pytest.raises(InputError, match="= 2 must equal the world size 1"):
        init_mesh(2)


def test_launched_ranks_without_process_group_are_not_taken_for_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="init_process_group"):
        init_mesh()


def over_hosts(rank, world_size):
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        init_mesh(tensor_parallel_size=2)
        assert not [w for w in caught if "span hosts" in str(w.message)]
        init_mesh(tensor_parallel_size=4)
    return [str(w.message) for w in caught if "span hosts" in str(w.message)]


def test_one_warning_for_tensor_parallelism_over_hosts():
    first, *others = run_on_ranks(over_hosts, 4)
    assert others == [[], [], []]
    assert len(first) == 1 and "tensor_parallel_size=4 with 2 ranks a host" in first[0] and "divides 2" in first[0]


class Options:
    def __init__(self, is_high_priority_stream):
        self.is_high_priority_stream, self.config = is_high_priority_stream, types.SimpleNamespace(max_ctas=None)


def test_nccl_of_the_tp_axis_goes_first_and_leaves_the_products_their_sms(monkeypatch):
    assert mesh_module._backend_override("cpu") is None
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(dist, "ProcessGroupNCCL", types.SimpleNamespace(Options=Options), raising=False)
    ((axis, (backend, options)),) = mesh_module._backend_override("cuda").items()
    assert (axis, backend, options.is_high_priority_stream) == ("tp", "nccl", True)
    assert options.config.max_ctas == mesh_module.TP_NCCL_SMS == 16

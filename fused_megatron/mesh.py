"""Grid of ranks with named axes over torch's DeviceMesh, and the layout that layers take from it. No globals."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fused_megatron.checks import check, check_divisible, check_one_of

AXES = ("pp", "dp", "cp", "tp")
"""Pipeline, data, context and tensor parallelism; the ranks of the first axis lie farthest apart."""
EXPERT_AXES = ("pp", "edp", "ep", "etp")
"""Axes of the same ranks for experts: copies of an expert, groups of experts, shards of an expert."""
TP_NCCL_SMS = 16
"""SMs (NCCL: CTAs) that a collective of the tp axis may take from the products beside it, of an H100's 132."""


def coordinates(rank: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the index of a rank along every axis, in the order of `sizes`; the last axis has neighbouring ranks.

    With sizes pp, dp, cp, tp:  rank == ((pp_rank * dp + dp_rank) * cp + cp_rank) * tp + tp_rank.
    """
    found: dict[str, int] = {}
    for axis in reversed(list(sizes)):
        found[axis] = rank % sizes[axis]
        rank //= sizes[axis]
    return {axis: found[axis] for axis in sizes}


def rank_at(indices: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Return the rank with these indices along the axes of `sizes`: the inverse of coordinates."""
    rank = 0
    for axis, size in sizes.items():
        rank = rank * size + indices[axis]
    return rank


@dataclass(frozen=True)
class ParallelLayout:
    """Options of layers and models that are sharded over ranks.

    Attributes:
        tp_group: the R ranks that share each layer; None for this rank only.
        cp_group: the ranks that share each sequence; None for this rank only.
        context_parallel_method: how these ranks attend to each other's positions: "ring", "all_gather", "all_to_all" or
            "all_to_all+ring".
        sequence_parallel: activations between tensor-parallel layers are sequence shards [S / R, ...].
        overlap: number of chunks of a product, so that products and collectives run side by side: True lets the cost
            model of the group choose, a number fixes it, False is 1.
        ep_group: the ranks that share the experts of a layer; None for this rank only.
        etp_group: the ranks that share each expert; None for this rank only.
        expert_dispatch: how tokens reach their experts: "all_to_all" or "all_gather"; None for the one with fewer
            bytes.
    """

    tp_group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    overlap: bool | int = True
    cp_group: dist.ProcessGroup | None = None
    context_parallel_method: str = "ring"
    ep_group: dist.ProcessGroup | None = None
    etp_group: dist.ProcessGroup | None = None
    expert_dispatch: str | None = None


@dataclass(frozen=True)
class SubMesh:
    """Some axes of a mesh, and the ranks that differ from this rank along these axes only.

    Attributes:
        axes: names of the axes, in the order of the mesh.
        size: number of ranks.
        rank: index of this rank among them; the last axis varies fastest.
        group: process group of these ranks; None for one rank.
    """

    axes: tuple[str, ...]
    size: int
    rank: int
    group: dist.ProcessGroup | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Mesh:
    """Grid of all ranks, seen from this rank. Made by init_mesh.

    The ranks of a tensor-parallel group are neighbours, so that the axis with the most traffic stays inside a machine;
    see coordinates. Experts fold their own axes over the ranks of a pipeline stage: edp x ep x etp = dp x cp x tp.

    Attributes:
        rank: index of this rank among all ranks.
        world_size: number of all ranks.
        sizes: length of each axis of AXES, by name.
        expert_sizes: length of each axis of EXPERT_AXES, by name.
        device_mesh: torch's DeviceMesh of the grid, with the axes pp, dp, tp, and cp if it is longer than 1; None for
            one process without a process group.
        groups: process groups by axes: of every axis longer than 1, and of ("dp", "cp") if both are.
        timeout_s: seconds that a collective of an axis waits for a silent rank; None: as the default process group.
    """

    rank: int
    world_size: int
    sizes: Mapping[str, int]
    expert_sizes: Mapping[str, int]
    device_mesh: DeviceMesh | None = field(default=None, repr=False)
    groups: dict[tuple[str, ...], dist.ProcessGroup] = field(default_factory=dict, repr=False)
    timeout_s: float | None = None

    def __getitem__(self, axes: str | tuple[str, ...]) -> SubMesh:
        """Return the sub-mesh of one axis or several: mesh["tp"], mesh["dp", "cp"].

        Raises:
            InputError: an unknown axis, axes of both grids, or another order than in the mesh.

        Communication: none for one axis and for ("dp", "cp"). For other axes, if two or more are longer than 1, and for
            edp where every rank has all experts, the first request creates a group; all ranks must make this request at
            once.
        """
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        for axis in axes:
            check_one_of("axis", axis, tuple(dict.fromkeys((*AXES, *EXPERT_AXES))))
        grid = self.sizes if set(axes) <= set(AXES) else self.expert_sizes
        check(
            len(axes) > 0 and axes == tuple(axis for axis in grid if axis in axes),
            f"axes={axes} must be some of {tuple(self.sizes)}, or of {tuple(self.expert_sizes)}, in this order",
        )
        return self._sub_mesh(axes, grid)

    def _sub_mesh(self, axes: tuple[str, ...], grid: Mapping[str, int]) -> SubMesh:
        sizes = {axis: grid[axis] for axis in axes}
        rank = rank_at(coordinates(self.rank, grid), sizes)
        return SubMesh(axes, prod(sizes.values()), rank, self._group(axes, grid))

    def _group(self, axes: tuple[str, ...], grid: Mapping[str, int]) -> dist.ProcessGroup | None:
        long = tuple(axis for axis in axes if grid[axis] > 1)
        if not long:
            return None
        if long not in self.groups:
            self.groups[long] = _new_group(long, grid, self.rank, self.world_size, self.timeout_s)
        return self.groups[long]

    @property
    def pp_size(self) -> int:
        """Length of the pp axis."""
        return self.sizes["pp"]

    @property
    def dp_size(self) -> int:
        """Length of the dp axis."""
        return self.sizes["dp"]

    @property
    def cp_size(self) -> int:
        """Length of the cp axis."""
        return self.sizes["cp"]

    @property
    def tp_size(self) -> int:
        """Length of the tp axis."""
        return self.sizes["tp"]

    @property
    def pp_rank(self) -> int:
        """Index of this rank along the pp axis."""
        return coordinates(self.rank, self.sizes)["pp"]

    @property
    def dp_rank(self) -> int:
        """Index of this rank along the dp axis."""
        return coordinates(self.rank, self.sizes)["dp"]

    @property
    def cp_rank(self) -> int:
        """Index of this rank along the cp axis."""
        return coordinates(self.rank, self.sizes)["cp"]

    @property
    def tp_rank(self) -> int:
        """Index of this rank along the tp axis."""
        return coordinates(self.rank, self.sizes)["tp"]

    @property
    def pp_group(self) -> dist.ProcessGroup | None:
        """Group of the ranks that differ from this rank along the pp axis only; None for length 1."""
        return self.groups.get(("pp",))

    @property
    def dp_group(self) -> dist.ProcessGroup | None:
        """Group of the ranks that differ from this rank along the dp axis only; None for length 1."""
        return self.groups.get(("dp",))

    @property
    def cp_group(self) -> dist.ProcessGroup | None:
        """Group of the ranks that differ from this rank along the cp axis only; None for length 1."""
        return self.groups.get(("cp",))

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """Group of the ranks that differ from this rank along the tp axis only; None for length 1."""
        return self.groups.get(("tp",))

    @property
    def replicas(self) -> SubMesh:
        """The ranks with the same dense weights: all data-parallel and context-parallel ranks."""
        return self["dp", "cp"]

    @property
    def expert_replicas(self) -> SubMesh:
        """The ranks with the same experts: `replicas`, if as many ranks share the experts as share dense layers.

        Communication: none, unless every rank has all experts and tensor_parallel_size is above 1: then the first
            request creates a group, and all ranks must make it at once.
        """
        return self["edp"] if self._has_expert_replicas else self.replicas

    @property
    def _has_expert_replicas(self) -> bool:
        return self.expert_sizes["ep"] * self.expert_sizes["etp"] != self.tp_size

    @property
    def replicas_text(self) -> str:
        """Name of the number of replicas, for messages."""
        return "data_parallel_size" + " x context_parallel_size" * (self.cp_size > 1)

    def split_data_parallel(self, shard_size: int, of_experts: bool = False) -> tuple[SubMesh, SubMesh]:
        """Split the replicas: return neighbouring replicas that share a state, and those that hold equal parts of it.

        Args:
            shard_size: number of neighbouring replicas that share; it divides the number of replicas.
            of_experts: split expert_replicas instead of replicas.

        Communication: the first call creates the groups; all ranks must make it at once. None if one of the two parts
            has all replicas.
        """
        of_experts = of_experts and self._has_expert_replicas
        replicas = self["edp"] if of_experts else self.replicas
        name = "the number of expert replicas" if of_experts else self.replicas_text
        check_divisible(name, replicas.size, "shard_size", shard_size)
        grid = self._split_grid(shard_size, of_experts)
        index, parts = coordinates(self.rank, grid), []
        for axis in list(grid)[2:0:-1]:
            group = replicas.group if grid[axis] == replicas.size else self._group((axis,), grid)
            parts.append(SubMesh((axis,), grid[axis], index[axis], group))
        return parts[0], parts[1]

    def ranks_of_a_state(self, shard_size: int, of_experts: bool = False) -> SubMesh:
        """Return the ranks that hold one optimizer state of a pipeline stage together, tensor-parallel ranks fastest.

        Args:
            shard_size: number of neighbouring replicas that share; 1 for the tensor-parallel ranks only.
            of_experts: the state of the same experts; the ranks that share each expert are fastest.

        Communication: as split_data_parallel; none for 1.
        """
        axis, axes = ("etp", ("edp", "etp")) if of_experts else ("tp", ("dp", "cp", "tp"))
        if shard_size in (1, self._num_replicas(of_experts)):
            return self[axis] if shard_size == 1 else self[axes]
        grid = self._split_grid(shard_size, of_experts)
        return self._sub_mesh((list(grid)[2], axis), grid)

    def _num_replicas(self, of_experts: bool) -> int:
        return self.expert_sizes["edp"] if of_experts else self.dp_size * self.cp_size

    def _split_grid(self, shard_size: int, of_experts: bool) -> dict[str, int]:
        """The grid with axes for copies and shards in place of dp and cp, which are neighbours, or in place of edp."""
        copies = self._num_replicas(of_experts) // shard_size
        if of_experts:
            inner = {axis: self.expert_sizes[axis] for axis in ("ep", "etp")}
            return {"pp": self.pp_size, "expert_copies": copies, "expert_shards": shard_size, **inner}
        return {"pp": self.pp_size, "copies": copies, "shards": shard_size, "tp": self.tp_size}

    def layout(
        self,
        *,
        sequence_parallel: bool = False,
        overlap: bool | int = True,
        context_parallel_method: str = "ring",
        expert_dispatch: str | None = None,
    ) -> ParallelLayout:
        """Return the layout that layers and models on this mesh take."""
        return ParallelLayout(
            self.tp_group,
            sequence_parallel,
            overlap,
            self.cp_group,
            context_parallel_method,
            ep_group=self.groups.get(("ep",)),
            etp_group=self.groups.get(("etp",)),
            expert_dispatch=expert_dispatch,
        )


def init_mesh(
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    data_parallel_size: int | None = None,
    *,
    context_parallel_size: int = 1,
    expert_parallel_size: int = 1,
    expert_tensor_parallel_size: int = 1,
    device_type: str | None = None,
    timeout_s: float | None = None,
) -> Mesh:
    """Arrange all ranks of the default process group in a grid.

    The product of the sizes must be the world size. One process needs no process group. Axes of length 1 have no group
    and cost nothing.

    Args:
        tensor_parallel_size: ranks that share each layer.
        pipeline_parallel_size: groups of layers that run one after the other.
        data_parallel_size: copies of the model; None divides the world size by the other sizes.
        context_parallel_size: ranks that share each sequence, attention included.
        expert_parallel_size: ranks that share the experts of a layer; folded over the data-, context- and
            tensor-parallel ranks of a pipeline stage.
        expert_tensor_parallel_size: ranks that share each expert; folded over the same ranks.
        device_type: device type of torch's DeviceMesh; None for "cuda" if the process group has NCCL, else "cpu".
        timeout_s: seconds that a collective of an axis waits for a silent rank; None: as the default process group
            (the timeout of init_process_group).

    Raises:
        InputError: the product of the sizes is not the world size; experts cannot be folded over the ranks of a stage;
            several ranks have no process group.

    Communication: creates the groups, so that all ranks must call at once; nothing later. If the process group is bound
        to a GPU (device_id of init_process_group), one collective for each axis; else one rendezvous for each group.
    """
    named = {
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "context_parallel_size": context_parallel_size,
        "expert_parallel_size": expert_parallel_size,
        "expert_tensor_parallel_size": expert_tensor_parallel_size,
    }
    if data_parallel_size is not None:
        named["data_parallel_size"] = data_parallel_size
    for name, size in named.items():
        check(size >= 1, f"{name}={size} must be at least 1")
    rank, world_size = _rank_and_world_size()
    model_ranks = tensor_parallel_size * pipeline_parallel_size * context_parallel_size
    if data_parallel_size is None:
        data_parallel_size = max(1, world_size // model_ranks)
    sizes = dict(
        zip(
            AXES, (pipeline_parallel_size, data_parallel_size, context_parallel_size, tensor_parallel_size), strict=True
        )
    )
    _check_product(sizes, world_size)
    stage_ranks, expert_ranks = world_size // sizes["pp"], expert_parallel_size * expert_tensor_parallel_size
    check(
        stage_ranks % expert_ranks == 0,
        f"expert_parallel_size={expert_parallel_size} x expert_tensor_parallel_size={expert_tensor_parallel_size} = "
        f"{expert_ranks} must divide the {stage_ranks} ranks of a pipeline stage (data x context x tensor parallel)",
    )
    expert_shape = (sizes["pp"], stage_ranks // expert_ranks, expert_parallel_size, expert_tensor_parallel_size)
    expert_sizes = dict(zip(EXPERT_AXES, expert_shape, strict=True))
    if not dist.is_initialized():
        return Mesh(rank, world_size, sizes, expert_sizes)
    _warn_if_tensor_parallel_leaves_the_host(tensor_parallel_size, rank)
    device_type = device_type or _device_type()
    device_axes = tuple(axis for axis in AXES if axis != "cp" or sizes["cp"] > 1)
    device_mesh = init_device_mesh(
        device_type,
        tuple(sizes[axis] for axis in device_axes),
        mesh_dim_names=device_axes,
        backend_override=_backend_override(device_type),
    )
    mesh = Mesh(rank, world_size, sizes, expert_sizes, device_mesh, timeout_s=timeout_s)
    _make_groups(mesh, device_axes)
    return mesh


def _make_groups(mesh: Mesh, device_axes: tuple[str, ...]) -> None:
    """Make the groups that every step needs. Other groups are made at their first request."""
    assert mesh.device_mesh is not None
    for axis in device_axes:
        if mesh.sizes[axis] > 1:
            mesh.groups[(axis,)] = _in_time(mesh.device_mesh.get_group(axis), mesh.timeout_s)
    wanted: list[tuple[str, ...]] = [("dp", "cp")] if mesh.sizes["dp"] > 1 and mesh.sizes["cp"] > 1 else []
    if mesh.expert_sizes["ep"] * mesh.expert_sizes["etp"] > 1:
        wanted += [(axis,) for axis in EXPERT_AXES[1:] if mesh.expert_sizes[axis] > 1]
    for axes in wanted:
        grid = mesh.sizes if axes == ("dp", "cp") else mesh.expert_sizes
        mesh.groups[axes] = _new_group(axes, grid, mesh.rank, mesh.world_size, mesh.timeout_s)


def _new_group(
    axes: tuple[str, ...], sizes: Mapping[str, int], rank: int, world_size: int, timeout_s: float | None
) -> dist.ProcessGroup:
    """Make the group of the ranks that differ from this rank along these axes only; all ranks make all such groups.

    A default process group that is bound to a GPU is split once: group after group would be a collective of all ranks
    each.
    """
    members: dict[tuple[int, ...], list[int]] = {}
    for other in range(world_size):
        index = coordinates(other, sizes)
        members.setdefault(tuple(index[axis] for axis in sizes if axis not in axes), []).append(other)
    assert dist.group.WORLD is not None
    if dist.group.WORLD.bound_device_id is not None:
        group = dist.split_group(split_ranks=list(members.values()))
    else:
        group, _ = dist.new_subgroups_by_enumeration(list(members.values()))
    assert group is not None and rank in dist.get_process_group_ranks(group)
    return _in_time(group, timeout_s)


def _in_time(group: dist.ProcessGroup, timeout_s: float | None) -> dist.ProcessGroup:
    """Return the group, or a new group of the same ranks, with this time-out; torch's default is 10 or 30 min.

    The time-out of the default process group belongs to the caller and is not changed. DeviceMesh uses this group for
    an axis of all ranks; a new group replaces it then.
    """
    world = dist.group.WORLD
    assert world is not None
    if group is world:
        return group if timeout_s is None else dist.new_group(timeout=timedelta(seconds=timeout_s))
    for device in group._device_types:
        backends = group._get_backend(device), world._get_backend(device)
        own, of_world = (getattr(getattr(backend, "options", None), "_timeout", None) for backend in backends)
        wanted = of_world if timeout_s is None else timedelta(seconds=timeout_s)
        if own is not None and wanted is not None and own != wanted:
            backends[0]._set_default_timeout(wanted)
    return group


def _check_product(sizes: Mapping[str, int], world_size: int) -> None:
    total = prod(sizes.values())
    names = {"tp": "tensor", "pp": "pipeline", "cp": "context", "dp": "data"}
    # Do not name an axis that the user did not ask for.
    shown = [f"{name}_parallel_size={sizes[axis]}" for axis, name in names.items() if axis != "cp" or sizes["cp"] > 1]
    check(
        total == world_size,
        f"{' x '.join(shown)} = {total} must equal the world size {world_size} "
        f"({_way_out(total // sizes['dp'], total, world_size)})",
    )


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    launched = os.environ.get("WORLD_SIZE", "1")
    # Without this check every rank would train a copy of its own, unnoticed.
    check(
        launched == "1",
        f"WORLD_SIZE={launched} ranks were launched but torch.distributed has no process group "
        "(call torch.distributed.init_process_group() before init_mesh)",
    )
    return 0, 1


def _backend_override(device_type: str) -> dict[Any, Any] | None:
    """Return the options of NCCL for the tp axis: high priority, and at most TP_NCCL_SMS SMs.

    At equal priority NCCL's kernels would wait until a whole product ends. Without a bound NCCL may take one SM for
    each of its channels, and slows the product beside it down.
    """
    if device_type != "cuda" or not dist.is_nccl_available() or "nccl" not in dist.get_backend_config():
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = TP_NCCL_SMS
    return {"tp": ("nccl", options)}


def _warn_if_tensor_parallel_leaves_the_host(tensor_parallel_size: int, rank: int) -> None:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))  # torchrun sets it; else the number is unknown
    if local < 1 or rank != 0 or local % tensor_parallel_size == 0:
        return
    warnings.warn(
        f"tensor_parallel_size={tensor_parallel_size} with {local} ranks a host: tensor-parallel groups span hosts, so "
        "that every block sends its 4 all-reduces of seq_len x batch x hidden_size over the network instead of inside "
        f"a machine (choose a tensor_parallel_size that divides {local}; pipeline stages send far less)",
        stacklevel=3,
    )


def _way_out(model_ranks: int, total: int, world_size: int) -> str:
    start = f"start {total} ranks: torchrun or fused-megatron launch, with --nproc-per-node {total}"
    return start if world_size % model_ranks else f"{start}; or data_parallel_size={world_size // model_ranks}"


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() and "nccl" in dist.get_backend_config() else "cpu"

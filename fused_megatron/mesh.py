"""The grid of ranks: axes pp (pipeline), dp (data) and tp (tensor), over torch's DeviceMesh. No globals."""

import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fused_megatron.checks import check

AXES = ("pp", "dp", "tp")
TP_NCCL_SMS = 16
"""SMs (NCCL: CTAs) that a collective of the tp axis may take from the products beside it, of an H100's 132."""


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands in the grid of ranks. Made by init_mesh.

    rank == (pp_rank * dp_size + dp_rank) * tp_size + tp_rank: the ranks of a tensor-parallel group are neighbours, so
    that the axis with the most traffic stays inside a machine.

    Attributes:
        rank, world_size: of all ranks.
        pp_size, dp_size, tp_size: length of each axis.
        pp_group, dp_group, tp_group: the ranks that differ from this one along that axis alone; None for length 1.
        device_mesh: torch's view of the same grid; None for one process without a process group.
    """

    rank: int
    world_size: int
    pp_size: int
    dp_size: int
    tp_size: int
    device_mesh: DeviceMesh | None = field(default=None, repr=False)
    pp_group: dist.ProcessGroup | None = field(default=None, repr=False)
    dp_group: dist.ProcessGroup | None = field(default=None, repr=False)
    tp_group: dist.ProcessGroup | None = field(default=None, repr=False)

    @property
    def tp_rank(self) -> int:
        """Position along the tp axis."""
        return self.rank % self.tp_size

    @property
    def dp_rank(self) -> int:
        """Position along the dp axis."""
        return self.rank // self.tp_size % self.dp_size

    @property
    def pp_rank(self) -> int:
        """Position along the pp axis."""
        return self.rank // (self.tp_size * self.dp_size)


def init_mesh(
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    data_parallel_size: int | None = None,
    *,
    device_type: str | None = None,
) -> Mesh:
    """Arrange all ranks of the default process group in a grid.

    Any sizes will do whose product is the world size. One process needs no process group.

    Args:
        tensor_parallel_size: ranks that share each layer.
        pipeline_parallel_size: groups of layers that run one after the other.
        data_parallel_size: copies of the model; None for what is left of the world.
        device_type: of torch's DeviceMesh; None for "cuda" where the process group has NCCL, else "cpu".

    Raises:
        InputError: sizes whose product is not the world size; several ranks without a process group.

    Communication: creates the groups, which every rank must do at once; nothing later.
    """
    sizes = {"tensor_parallel_size": tensor_parallel_size, "pipeline_parallel_size": pipeline_parallel_size}
    if data_parallel_size is not None:
        sizes["data_parallel_size"] = data_parallel_size
    for name, size in sizes.items():
        check(size >= 1, f"{name}={size} must be at least 1")
    rank, world_size = _rank_and_world_size()
    layer_ranks = tensor_parallel_size * pipeline_parallel_size
    if data_parallel_size is None:
        data_parallel_size = max(1, world_size // layer_ranks)
    total = layer_ranks * data_parallel_size
    check(
        total == world_size,
        f"tensor_parallel_size={tensor_parallel_size} x pipeline_parallel_size={pipeline_parallel_size} x "
        f"data_parallel_size={data_parallel_size} = {total} must equal the world size {world_size} "
        f"({_way_out(tensor_parallel_size, pipeline_parallel_size, total, world_size)})",
    )
    if not dist.is_initialized():
        return Mesh(rank=0, world_size=1, pp_size=1, dp_size=1, tp_size=1)
    _warn_if_tensor_parallel_leaves_the_host(tensor_parallel_size, rank)
    shape = (pipeline_parallel_size, data_parallel_size, tensor_parallel_size)
    device_type = device_type or _device_type()
    device_mesh = init_device_mesh(
        device_type, shape, mesh_dim_names=AXES, backend_override=_backend_override(device_type)
    )
    pp_group, dp_group, tp_group = (
        device_mesh.get_group(axis) if size > 1 else None for axis, size in zip(AXES, shape, strict=True)
    )
    return Mesh(rank, world_size, *shape, device_mesh, pp_group, dp_group, tp_group)


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    launched = os.environ.get("WORLD_SIZE", "1")
    # Without this, every rank would train a copy of its own, and no one would notice.
    check(
        launched == "1",
        f"WORLD_SIZE={launched} ranks were launched but torch.distributed has no process group "
        "(call torch.distributed.init_process_group() before init_mesh)",
    )
    return 0, 1


def _backend_override(device_type: str) -> dict[Any, Any] | None:
    """For the tp axis: NCCL's kernels before the products that hide them, and on at most TP_NCCL_SMS SMs.

    At equal priority they would wait for a whole product to end; without a bound NCCL may take as many SMs as it has
    channels, and the product beside it is late by as much.
    """
    if device_type != "cuda" or not dist.is_nccl_available() or "nccl" not in dist.get_backend_config():
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = TP_NCCL_SMS
    return {"tp": ("nccl", options)}


def _warn_if_tensor_parallel_leaves_the_host(tensor_parallel_size: int, rank: int) -> None:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))  # what torchrun says; without it nothing is known
    if local < 1 or rank != 0 or local % tensor_parallel_size == 0:
        return
    warnings.warn(
        f"tensor_parallel_size={tensor_parallel_size} with {local} ranks a host: tensor-parallel groups span hosts, so "
        "that every block sends its 4 all-reduces of seq_len x batch x hidden_size over the network instead of inside "
        f"a machine (choose a tensor_parallel_size that divides {local}; pipeline stages send far less)",
        stacklevel=3,
    )


def _way_out(tensor_parallel_size: int, pipeline_parallel_size: int, total: int, world_size: int) -> str:
    layer_ranks = tensor_parallel_size * pipeline_parallel_size
    start = f"start {total} ranks: torchrun --nproc-per-node {total}"
    return start if world_size % layer_ranks else f"{start}; or data_parallel_size={world_size // layer_ranks}"


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() and "nccl" in dist.get_backend_config() else "cpu"

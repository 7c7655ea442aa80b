"""Refusal of wrappers (DistributedDataParallel, fully_shard) that take different shards for copies of one model."""

import sys
from types import FrameType
from typing import Any

import torch.distributed as dist

from fused_megatron.checks import InputError
from fused_megatron.collectives import Group, group_size

# Frames from the module that is asked for its parameters up to the user's call.
_DEPTH = 6


def refuse_replication(group: Group, of_experts: bool = False) -> None:
    """Raise if the caller's caller is a wrapper over ranks that hold different shards.

    DistributedDataParallel begins by copying the parameters of its first rank to the others; fully_shard cuts them over
    its ranks. Both are right over data-parallel ranks, which hold the same shards. Neither tells a module its ranks.
    So this function reads the frames of their constructors, when they ask the module for its parameters and before they
    change any.

    Args:
        group: ranks that hold other shards of the module; None for one rank.
        of_experts: whether the module holds experts, and the group other experts.

    Raises:
        InputError: the wrapper's ranks hold different shards.
    """
    frame: FrameType | None = sys._getframe(2)
    found: tuple[str, list[int], str] | None = None
    for _ in range(_DEPTH):
        if frame is None or found is not None:
            break
        found = _wrapper_of(frame)
        frame = frame.f_back
    if found is None or group_size(group) == 1:
        return
    name, ranks, way_out = found
    own = dist.get_process_group_ranks(group)
    if len(set(ranks) & set(own)) > 1:
        way_out = (
            "fused_megatron.shard_data_parallel knows the replicas of experts"
            if of_experts
            else f"{way_out} works over the data-parallel ranks; where there are none, leave it out; transformers' "
            "Trainer: fm.TrainerCallback, Accelerate: fm.Accelerator, Lightning: fm.LightningStrategy"
        )
        raise InputError(
            f"{name} over ranks {ranks} would take the shards of {'expert' if of_experts else 'tensor'}-parallel ranks "
            f"{own} for copies of each other ({way_out})"
        )


def _wrapper_of(frame: FrameType) -> tuple[str, list[int], str] | None:
    """Return (name, ranks, way out) of the wrapper whose code the frame runs; None for other code."""
    module = frame.f_globals.get("__name__")
    if module == "torch.nn.parallel.distributed":
        group: Any = getattr(frame.f_locals.get("self"), "process_group", None)
        if group is not None:
            ranks = dist.get_process_group_ranks(group)
            return "DistributedDataParallel", ranks, "process_group=mesh.dp_group"
    if module == "torch.distributed._composable.replicate":
        options = getattr(frame.f_locals.get("self"), "_init_kwargs", None)
        if options is not None:
            ranks = dist.get_process_group_ranks(options.get("process_group"))
            return "replicate", ranks, "process_group=mesh.dp_group"
    if module == "torch.distributed.fsdp._fully_shard._fully_shard" and frame.f_code.co_name == "fully_shard":
        mesh: Any = frame.f_locals.get("mesh")
        if mesh is not None:
            return "fully_shard", mesh.mesh.flatten().tolist(), "mesh=mesh.device_mesh['dp']"
    return None

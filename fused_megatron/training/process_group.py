"""Process group of the ranks that a launcher started, and errors of one rank that every rank raises."""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fused_megatron.checkpoint.errors import SharedCheckpointError
from fused_megatron.checks import InputError, SharedInputError
from fused_megatron.collectives.together import build_together
from fused_megatron.training.launcher import store_of_the_launcher

T = TypeVar("T")

PHASE_S = 1800.0
"""Longest phase of a run in which ranks wait for one rank that lives, as for a slow disk."""


@dataclass(frozen=True)
class ThisRank:
    """Rank, number of ranks and device of this process."""

    rank: int
    world_size: int
    device: torch.device


@contextmanager
def joined_ranks(timeout_s: float, refused: InputError | None = None) -> Iterator[ThisRank]:
    """Join the process group that the launcher's environment variables describe; leave it at the end.

    NCCL on GPUs, gloo on CPUs. Without such variables this process is the only rank. An existing process group is used
    and left open.

    Args:
        timeout_s: a collective that waits longer for another rank raises an error.
        refused: the reason why this rank cannot run its command; None: it can.

    Raises:
        SharedInputError: on every rank, if any rank was given `refused`.

    Communication: two all-gathers of a few bytes.
    """
    found = dist.is_initialized()
    rank = dist.get_rank() if found else int(os.environ.get("RANK", "0"))
    world_size = dist.get_world_size() if found else int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        _check_enough_gpus()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world_size > 1 and not found:
        if device.type == "cuda":
            connect_on_demand()
        dist.init_process_group(
            **backend_of(device),
            init_method=store_of_the_launcher(),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )

    def accepted() -> None:
        if refused is not None:
            raise refused

    on_every_rank(accepted)
    yield ThisRank(rank, world_size, device)
    # Only after success: destroying a group after a rank was lost can wait for that rank.
    if world_size > 1 and not found:
        dist.destroy_process_group()


def backend_of(device: torch.device) -> dict[str, Any]:
    """Return the arguments of init_process_group that choose the network of a device.

    A GPU is bound to the process group: NCCL connects the ranks once, and the group of an axis is split from them by
    one collective, instead of one group after the other, each with a rendezvous of its own.
    """
    if device.type != "cuda":
        return {"backend": "gloo"}
    # gloo, beside NCCL, carries the few messages of CPUs: ranks agree on errors and on checkpoints.
    return {"backend": "cpu:gloo,cuda:nccl", "device_id": device}


def connect_on_demand() -> None:
    """Let torch connect the ranks of a gloo group when they first talk, unless the user's environment says otherwise.

    Beside NCCL, gloo gathers a few values, around a ring. By default each rank would connect to all others: 1,023
    sockets and as many look-ups for each group of 1,024 ranks, where a process may often open 1,024 files.
    """
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")


def _check_enough_gpus() -> None:
    """Raise SharedInputError if a machine has more ranks than GPUs; all its ranks see the same two numbers."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    if ranks > gpus:
        raise SharedInputError(
            f"{ranks} ranks were started on a machine with {gpus} GPU(s): start at most {gpus}, or set "
            f"CUDA_VISIBLE_DEVICES= to run on the CPU"
        )


def on_every_rank(build: Callable[[], T]) -> T:
    """Return build(). If it raises on any rank of the run, every rank raises the same one-line error."""
    return build_together(world_group(), build, SharedCheckpointError)


def new_group_for_saves(timeout_s: float) -> dist.ProcessGroup | None:
    """Make a gloo group of all ranks of the run, for BackgroundSave; None if this process is the only rank.

    Args:
        timeout_s: of the other groups. A rank may write longer than this: the group waits up to PHASE_S.

    Communication: the ranks connect to each other.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=max(timeout_s, PHASE_S)))


def world_group() -> dist.ProcessGroup | None:
    """Return the group of all ranks of the run; None if this process is the only rank."""
    return dist.group.WORLD if dist.is_initialized() else None

"""Joining the ranks that torchrun started, and making one rank's mistake everybody's error."""

import datetime
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from fused_megatron.checks import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """Who this process is, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device


@contextmanager
def launched(timeout_s: float) -> Iterator[Launch]:
    """Join the process group that torchrun's environment names: NCCL on GPUs, gloo on CPUs; alone without torchrun.

    Args:
        timeout_s: a collective that waits longer for another rank raises on this one.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world_size > 1:
        # gloo beside NCCL carries the few messages between CPUs: agreement on errors and on checkpoints.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    yield Launch(rank, world_size, device)
    # Only after success: tearing a group down after a lost peer can wait for that peer.
    if world_size > 1:
        dist.destroy_process_group()


def on_every_rank(build: Callable[[], T]) -> T:
    """Return build(); if it raises an InputError on any rank, raise that error on every rank.

    Without this the rank that fails would leave the others waiting in their next collective.
    """
    result: T | None = None
    message = ""
    try:
        result = build()
    except InputError as error:
        message = str(error)
    if dist.is_initialized():
        messages = _gather_text(message)
        message = next((m for m in messages if m), "")
    if message:
        raise InputError(message)
    return result  # type: ignore[return-value]


def _gather_text(text: str) -> list[str]:
    """The text of every rank, through plain byte tensors: no pickle crosses the wire."""
    data = torch.frombuffer(bytearray(json.dumps(text).encode()), dtype=torch.uint8)
    sizes = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor(data.numel()))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: data.numel()] = data
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [json.loads(bytes(g[: int(n)].tolist())) for g, n in zip(gathered, sizes, strict=True)]

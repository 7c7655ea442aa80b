"""Check, before the model is built, that the memory a run needs is free."""

import socket
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fused_megatron.checks import SharedInputError
from fused_megatron.collectives.together import gather_json
from fused_megatron.config import TrainConfig
from fused_megatron.mesh import Mesh
from fused_megatron.observe.free_memory import memory_bytes
from fused_megatron.planning.rank_memory import rank_memory
from fused_megatron.training.process_group import world_group


class MemoryNeed(NamedTuple):
    """Memory that one rank needs, and free memory where it computes.

    Attributes:
        pool: name of the memory: the host, with its GPU if the rank computes on one. Ranks may share a pool.
        needed_bytes: of this rank.
        free_bytes: of the pool; 0 if the system does not tell.
    """

    pool: str
    needed_bytes: float
    free_bytes: float


def check_memory(config: TrainConfig, mesh: Mesh, device: torch.device, vocabulary: str) -> None:
    """Raise unless weights, gradients and optimizer state of every rank fit; activations are not counted.

    Args:
        config: model.vocab_size must be given.
        mesh: of all ranks.
        device: of this rank.
        vocabulary: where vocab_size comes from, for the message.

    Raises:
        SharedInputError: on every rank.

    Communication: one exchange of JSON.
    """
    memory = rank_memory(config, mesh.pp_rank, mesh.dp_size)
    pool = socket.gethostname()
    free = memory_bytes()[1]
    if device.type == "cuda":
        pool = f"{pool} {device}"
        free = float(torch.cuda.mem_get_info(device)[0])
    need = MemoryNeed(pool, memory.weights + memory.gradients + memory.optimizer, free)
    problem = memory_problem([MemoryNeed(*each) for each in gather_json(need, world_group())])
    if problem is not None:
        raise SharedInputError(
            f"{problem}: take a smaller model or more ranks (model.vocab_size={config.model.vocab_size}, from "
            f"{vocabulary})"
        )


def memory_problem(needs: Sequence[MemoryNeed]) -> str | None:
    """Describe the first pool that is too small for its ranks; None if every pool is large enough."""
    needed: dict[str, float] = defaultdict(float)
    for need in needs:
        needed[need.pool] += need.needed_bytes
    for need in needs:
        if needed[need.pool] > need.free_bytes > 0:
            ranks = sum(other.pool == need.pool for other in needs)
            return (
                f"weights, gradients and optimizer of {ranks} rank{'s' * (ranks > 1)} on {need.pool} need "
                f"{needed[need.pool] / 1e9:,.1f} GB, there are {need.free_bytes / 1e9:,.1f} GB"
            )
    return None

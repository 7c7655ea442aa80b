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
    """Raise unless weights, gradients, optimizer state and the copy of a checkpoint of every rank fit.

    Activations are not counted.

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
    host = socket.gethostname()
    host_free = memory_bytes()[1]
    pool, free = host, host_free
    if device.type == "cuda":
        pool = f"{host} {device}"
        free = float(torch.cuda.mem_get_info(device)[0])
    need = MemoryNeed(pool, memory.weights + memory.gradients + memory.optimizer, free)
    on_host = checkpoint_copy_bytes(config, memory.num_parameters, mesh.replicas.size)
    if device.type == "cpu":
        on_host += need.needed_bytes
    with_copy = MemoryNeed(host, on_host, host_free)
    found = [[MemoryNeed(*each) for each in of_rank] for of_rank in gather_json([need, with_copy], world_group())]
    problem = memory_problem([needs[0] for needs in found])
    if problem is not None:
        raise SharedInputError(
            f"{problem}: take a smaller model or more ranks (model.vocab_size={config.model.vocab_size}, from "
            f"{vocabulary})"
        )
    problem = memory_problem([needs[1] for needs in found], "tensors in host memory and the copies of a checkpoint")
    if problem is not None:
        raise SharedInputError(f"{problem}: set training.async_checkpoint=false")


def checkpoint_copy_bytes(config: TrainConfig, num_parameters: int, replicas: int) -> float:
    """Compute the bytes that a rank copies for a checkpoint that is written behind training.

    Weights and optimizer state, of which each of the replicas writes a part: 12 bytes a parameter in float32 (weight
    and moments), 14 in bfloat16 (and float32 main weights).
    """
    if not config.training.async_checkpoint:
        return 0.0
    return num_parameters * (12 if config.training.weight_dtype == "float32" else 14) / replicas


def memory_problem(needs: Sequence[MemoryNeed], what: str = "weights, gradients and optimizer") -> str | None:
    """Describe the first pool that is too small for its ranks; None if every pool is large enough.

    Args:
        what: needs the memory.
    """
    needed: dict[str, float] = defaultdict(float)
    for need in needs:
        needed[need.pool] += need.needed_bytes
    for need in needs:
        if needed[need.pool] > need.free_bytes > 0:
            ranks = sum(other.pool == need.pool for other in needs)
            return (
                f"{what} of {ranks} rank{'s' * (ranks > 1)} on {need.pool} need "
                f"{needed[need.pool] / 1e9:,.1f} GB, there are {need.free_bytes / 1e9:,.1f} GB"
            )
    return None

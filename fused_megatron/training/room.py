"""The memory that a model needs, compared with what is free before any of it is made."""

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
from fused_megatron.training.launch import world_group


class Room(NamedTuple):
    """What a rank needs, and what is free where it computes.

    Attributes:
        place: ranks of one place share its memory.
        needed_bytes, free_bytes: of this rank, and of the place.
    """

    place: str
    needed_bytes: float
    free_bytes: float


def check_room(config: TrainConfig, mesh: Mesh, device: torch.device, vocabulary: str) -> None:
    """Raise unless weights, gradients and optimizer of every rank fit; activations come on top.

    Args:
        config: model.vocab_size must be given.
        mesh: of all ranks.
        device: of this rank.
        vocabulary: where vocab_size comes from.

    Raises:
        SharedInputError: on every rank.

    Communication: one exchange of JSON.
    """
    memory = rank_memory(config, mesh.pp_rank, mesh.dp_size)
    place, free = socket.gethostname(), memory_bytes()[1]
    if device.type == "cuda":
        place, free = f"{place} {device}", float(torch.cuda.mem_get_info(device)[0])
    room = Room(place, memory.weights + memory.gradients + memory.optimizer, free)
    rooms = [Room(*each) for each in gather_json(room, world_group())]
    problem = room_problem(rooms)
    if problem is not None:
        raise SharedInputError(
            f"{problem}: take a smaller model or more ranks (model.vocab_size={config.model.vocab_size}, from "
            f"{vocabulary})"
        )


def room_problem(rooms: Sequence[Room]) -> str | None:
    """What does not fit; None where every place has room for its ranks."""
    needed: dict[str, float] = defaultdict(float)
    for room in rooms:
        needed[room.place] += room.needed_bytes
    for room in rooms:
        if needed[room.place] > room.free_bytes > 0:
            ranks = sum(other.place == room.place for other in rooms)
            return (
                f"weights, gradients and optimizer of {ranks} rank{'s' * (ranks > 1)} on {room.place} need "
                f"{needed[room.place] / 1e9:,.1f} GB, there are {room.free_bytes / 1e9:,.1f} GB"
            )
    return None

"""What a rank reports of a training run: every tensor as pieces of the full one, with their place in it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from fused_megatron.sharding import parameter_parts
from fused_megatron.sharding.full_tensor import held_values

START, OUTPUT, LOSS, GRADIENT, NORM, WEIGHT = "start", "output", "loss", "gradient", "norm", "weight"
"""Kinds of tensors: weights before the first update, outputs of modules, .., weights after an update."""


class Key(NamedTuple):
    """One tensor of a run.

    Attributes:
        kind: one of the kinds above.
        step: the update before which it is computed, from 1; a WEIGHT is the result of that update.
        name: of the parameter or module; "" where there is one of the kind.
    """

    kind: str
    step: int
    name: str = ""

    def describe(self) -> str:
        """In words: "gradient of blocks.0.mlp_norm.weight in step 1"."""
        return {
            START: f"weight {self.name} before the first update",
            OUTPUT: f"output of {self.name} in step {self.step}",
            LOSS: f"loss of step {self.step}",
            GRADIENT: f"gradient of {self.name} in step {self.step}",
            NORM: f"gradient norm of step {self.step}",
            WEIGHT: f"weight {self.name} after update {self.step}",
        }[self.kind]


class Piece(NamedTuple):
    """Some elements of a full tensor.

    Attributes:
        values: float32 or float64.
        place: (start, stop) in each dim of the full tensor.
        part: the name of these rows, where a parameter stacks several full ones (query, key, value).
    """

    values: np.ndarray
    place: tuple[tuple[int, int], ...]
    part: str = ""

    def of(self, full: np.ndarray) -> np.ndarray:
        """The same elements of a full tensor."""
        return full[tuple(slice(start, stop) for start, stop in self.place)]


@dataclass(frozen=True)
class RankRecord:
    """Everything that one rank computed.

    Attributes:
        coordinates: of the rank, by axis of the mesh.
        pieces: by tensor, in the order in which this rank computed them.
    """

    coordinates: dict[str, int] = field(default_factory=dict)
    pieces: dict[Key, list[Piece]] = field(default_factory=dict)

    def add(self, key: Key, piece: Piece) -> None:
        """One more piece of a tensor."""
        self.pieces.setdefault(key, []).append(piece)

    def add_number(self, key: Key, value: float) -> None:
        """A tensor of one element."""
        self.add(key, Piece(np.array([value], dtype=np.float64), ((0, 1),)))

    def add_parameter(self, key: Key, parameter: torch.Tensor, values: torch.Tensor, transposed: bool = False) -> None:
        """A parameter, or what has its shape (a gradient), without padding; as of sharding.full_tensor."""
        for part, mine, index in shard_places(parameter, values.detach()):
            turned = transposed and mine.dim() == 2
            place = tuple((each.start, each.stop) for each in (index[::-1] if turned else index))
            self.add(key, Piece(as_array(mine.t() if turned else mine), place, part))


def shard_places(
    parameter: torch.Tensor, values: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor, tuple[slice, ...]]]:
    """For each part of a parameter: its name, its real elements of values, and their index in the full tensor."""
    parts = parameter_parts(parameter)
    for part, (mine, index) in zip(parts, held_values(parts, values), strict=True):
        yield part.name, mine, index


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A copy that pickles quickly."""
    wide = tensor.detach().double() if tensor.dtype == torch.float64 else tensor.detach().float()
    return np.array(wide.cpu().numpy())


def full_arrays(record: RankRecord) -> dict[Key, np.ndarray]:
    """The full tensors of one process, in the order of computation."""
    found = {}
    for key, pieces in record.pieces.items():
        stops = [[stop for _, stop in piece.place] for piece in pieces]
        full = np.full([max(dim) for dim in zip(*stops, strict=True)], np.nan, dtype=pieces[0].values.dtype)
        for piece in pieces:
            piece.of(full)[...] = piece.values
        found[key] = full
    return found

"""Record of a rank's tensors in a training run, as pieces of full tensors."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from fused_megatron.sharding import parameter_parts, parameter_record
from fused_megatron.sharding.full_tensor import held_values

START, OUTPUT, LOSS, GRADIENT, NORM, WEIGHT = "start", "output", "loss", "gradient", "norm", "weight"
"""Kinds of tensors: weights before the first update, outputs of modules, loss, gradients, gradient norm, weights after
an update."""


class Key(NamedTuple):
    """One tensor of a run.

    Attributes:
        kind: one of the kinds above.
        step: number of the step that computes it, from 1; 0 for START. A WEIGHT is the result of the step's update.
        name: name of the parameter or module; "" for the loss and the norm.
    """

    kind: str
    step: int
    name: str = ""

    def describe(self) -> str:
        """Return the key as text: "gradient of blocks.0.mlp_norm.weight in step 1"."""
        return {
            START: f"weight {self.name} before the first update",
            OUTPUT: f"output of {self.name} in step {self.step}",
            LOSS: f"loss of step {self.step}",
            GRADIENT: f"gradient of {self.name} in step {self.step}",
            NORM: f"gradient norm of step {self.step}",
            WEIGHT: f"weight {self.name} after update {self.step}",
        }[self.kind]


class Piece(NamedTuple):
    """A block of elements of a full tensor.

    Attributes:
        values: the elements, float32 or float64.
        place: (start, stop) of the block in each dim of the full tensor.
        part: name of the full parameter, if a parameter stacks several (query, key, value); else "".
    """

    values: np.ndarray
    place: tuple[tuple[int, int], ...]
    part: str = ""

    def of(self, full: np.ndarray) -> np.ndarray:
        """Return the same block of another full tensor."""
        return full[tuple(slice(start, stop) for start, stop in self.place)]


@dataclass(frozen=True)
class RankRecord:
    """All recorded tensors of one rank.

    Attributes:
        coordinates: coordinate of the rank on each mesh axis.
        pieces: pieces of each tensor, in the order in which this rank computed them.
    """

    coordinates: dict[str, int] = field(default_factory=dict)
    pieces: dict[Key, list[Piece]] = field(default_factory=dict)

    def add(self, key: Key, piece: Piece) -> None:
        """Add a piece of a tensor."""
        self.pieces.setdefault(key, []).append(piece)

    def add_number(self, key: Key, value: float) -> None:
        """Add a tensor of one element."""
        self.add(key, Piece(np.array([value], dtype=np.float64), ((0, 1),)))

    def add_parameter(self, key: Key, parameter: torch.Tensor, values: torch.Tensor, transposed: bool = False) -> None:
        """Add a parameter, or a tensor of its shape (a gradient), without padding, as sharding.full_tensor does."""
        for part, mine, index in shard_places(parameter, values.detach()):
            turned = transposed and mine.dim() == 2
            place = tuple((each.start, each.stop) for each in (index[::-1] if turned else index))
            self.add(key, Piece(as_array(mine.t() if turned else mine), place, part))


def shard_places(
    parameter: torch.Tensor, values: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor, tuple[slice, ...]]]:
    """Yield for each part of a parameter: its name, its elements of values without padding, their full index."""
    parts, experts = parameter_parts(parameter), parameter_record(parameter).experts
    held = held_values(parts, values, 0 if experts is None else experts.ep_rank)
    stored_shape = parameter_record(parameter).stored_shape
    for part, (mine, index) in zip(parts, held, strict=True):
        if stored_shape is None:
            yield part.name, mine, index
            continue
        # The rows of one of the experts that the model itself stores as [E, rows, columns].
        expert, start = divmod(index[0].start, stored_shape[1])
        yield "", mine.unsqueeze(0), (slice(expert, expert + 1), slice(start, start + mine.shape[0]), index[1])


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a copy as a float32 or float64 array, which pickles quickly."""
    wide = tensor.detach().double() if tensor.dtype == torch.float64 else tensor.detach().float()
    return np.array(wide.cpu().numpy())


def full_arrays(record: RankRecord) -> dict[Key, np.ndarray]:
    """Return the full tensors of one process, in the order of computation."""
    found = {}
    for key, pieces in record.pieces.items():
        stops = [[stop for _, stop in piece.place] for piece in pieces]
        full = np.full([max(dim) for dim in zip(*stops, strict=True)], np.nan, dtype=pieces[0].values.dtype)
        for piece in pieces:
            piece.of(full)[...] = piece.values
        found[key] = full
    return found

"""Initial values that do not depend on how a weight is sharded."""

import hashlib
import itertools

import numpy as np
import torch

from fused_megatron.checks import check, has_values
from fused_megatron.sharding.box import Box, TensorBox
from fused_megatron.sharding.parameter_record import parameter_parts

# A full weight is drawn in tiles of this edge (of experts' [E, F, H] each matrix is), each from a stream of its own: a
# rank draws only the tiles that it touches, and holds one at a time. Changing it changes every initial weight.
TILE = 256


@torch.no_grad()
def fill_normal_shard_(parameter: torch.Tensor, std: float, *, seed: int, name: str) -> None:
    """Fill a parameter with its part of the full weight ~ Normal(0, std), as torch.nn.init.normal_ would the whole.

    The full weight is a function of (seed, name, full shape, std) alone: the same for every tensor-parallel size,
    device and dtype (up to rounding). Rows that pad the vocabulary become 0.

    Args:
        parameter: 1 to 3 dims, float; marked with its ParameterShard, or whole. Nothing happens where it has
            no values (checks.has_values).
        std: standard deviation.
        seed: of the model.
        name: of the parameter in the model; two parameters of one name and seed get the same values. Where it stacks
            several full ones, each is drawn by its own name, `name.part`.

    Raises:
        InputError: no dims, or more than three.

    Communication: none; every rank draws what it needs.
    Memory: one tile of TILE x TILE float32 numbers beside the parameter.
    """
    check(1 <= parameter.dim() <= 3, f"{name}: parameter.shape={tuple(parameter.shape)} must have 1 to 3 dims")
    if not has_values(parameter):
        return
    parameter.zero_()
    for part in parameter_parts(parameter):
        _fill(part.held(parameter), std, seed, part.full_name(name))


def _fill(held: TensorBox, std: float, seed: int, name: str) -> None:
    box = held.box
    edges = (1, TILE, TILE)[-len(box.shape) :]
    spans = zip(box.offset, box.shape, edges, strict=True)
    for tile in itertools.product(*(range(o // edge, -(-(o + size) // edge)) for o, size, edge in spans)):
        tile_box = Box(tuple(i * edge for i, edge in zip(tile, edges, strict=True)), edges)
        if inside := tile_box.intersect(box):
            place = inside.slices(tile_box.offset)
            values = _normal_rows(seed, name, tile, edges, place)[place] * np.float32(std)
            held.tensor[inside.slices(box.offset)] = torch.from_numpy(values).to(held.tensor.dtype)


def _normal_rows(
    seed: int, name: str, tile: tuple[int, ...], edges: tuple[int, ...], place: tuple[slice, ...]
) -> np.ndarray:
    """The tile's rows down to the last that place needs: numbers come row by row, so the others need no drawing."""
    digest = hashlib.sha256(repr((seed, name, tile)).encode()).digest()
    # Not torch's generator: it keeps 32 bits of a CPU seed, and its values depend on the CPU's vector width.
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    dim = max(0, len(edges) - 2)
    return generator.standard_normal((*edges[:dim], place[dim].stop, *edges[dim + 1 :]), dtype=np.float32)

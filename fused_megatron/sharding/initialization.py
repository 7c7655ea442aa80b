"""Initial weights that are the same for every way to shard them."""

import hashlib
import itertools

import numpy as np
import torch

from fused_megatron.checks import check, has_values
from fused_megatron.sharding.box import Box, TensorBox
from fused_megatron.sharding.parameter_record import parameter_parts

# A full weight is drawn in square tiles with this edge, each from its own random stream (for experts [E, F, H] each
# matrix is cut into tiles). A rank draws only the tiles that its shard touches, and holds one tile at a time. Another
# edge would change every initial weight.
TILE = 256


@torch.no_grad()
def fill_normal_shard_(parameter: torch.Tensor, std: float, *, seed: int, name: str) -> None:
    """Fill a parameter with its part of a full weight ~ Normal(0, std): torch.nn.init.normal_ for shards.

    The full weight depends on (seed, name, full shape, std) only: it is the same for every tensor-parallel size, device
    and dtype (up to rounding). Rows that pad the vocabulary become 0.

    Args:
        parameter: 1 to 3 dims, float; marked with its shard, or not sharded. Nothing happens where it has no values
            (checks.has_values).
        std: standard deviation.
        seed: seed of the model.
        name: name of the parameter in the model; two parameters with one name and seed get the same values. The parts
            of a stacked parameter are drawn by names of their own, `name.part`.

    Raises:
        InputError: no dims, or more than three.

    Communication: none; every rank draws its own part.
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
            wanted = inside.slices(tile_box.offset)
            values = _normal_rows(seed, name, tile, edges, wanted)[wanted] * np.float32(std)
            held.tensor[inside.slices(box.offset)] = torch.from_numpy(values).to(held.tensor.dtype)


def _normal_rows(
    seed: int, name: str, tile: tuple[int, ...], edges: tuple[int, ...], wanted: tuple[slice, ...]
) -> np.ndarray:
    """Draw the rows of a tile down to the last wanted one. Numbers come row by row, so the rest is not drawn."""
    digest = hashlib.sha256(repr((seed, name, tile)).encode()).digest()
    # Not torch's generator: it keeps 32 bits of a CPU seed, and its values depend on the CPU's vector width.
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    dim = max(0, len(edges) - 2)
    return generator.standard_normal((*edges[:dim], wanted[dim].stop, *edges[dim + 1 :]), dtype=np.float32)

"""Initial values that do not depend on how a weight is sharded."""

import hashlib
import itertools

import numpy as np
import torch

from fused_megatron.checks import check
from fused_megatron.sharding.parameter_shard import ParameterShard, parameter_parts

# A full weight is drawn in tiles of this edge, each from a stream of its own: a rank draws only the tiles that it
# touches, and holds one at a time. Changing it changes every initial weight.
TILE = 256


@torch.no_grad()
def fill_normal_shard_(parameter: torch.Tensor, std: float, *, seed: int, name: str) -> None:
    """Fill a parameter with its part of the full weight ~ Normal(0, std), as torch.nn.init.normal_ would the whole.

    The full weight is a function of (seed, name, full shape, std) alone: the same for every tensor-parallel size,
    device and dtype (up to rounding). Rows that pad the vocabulary become 0.

    Args:
        parameter: 1 or 2 dims, float; marked with its ParameterShard, or whole. On the meta device nothing happens.
        std: standard deviation.
        seed: of the model.
        name: of the parameter in the model; two parameters of one name and seed get the same values. Where it stacks
            several full ones, each is drawn by its own name, `name.part`.

    Raises:
        InputError: more than two dims.

    Communication: none; every rank draws what it needs.
    Memory: one tile of TILE x TILE float32 numbers beside the parameter.
    """
    check(parameter.dim() in (1, 2), f"{name}: parameter.shape={tuple(parameter.shape)} must have 1 or 2 dims")
    if parameter.device.type == "meta":
        return
    for part in parameter_parts(parameter):
        _fill(part.of(parameter), part.shard, std, seed, part.full_name(name))


def _fill(parameter: torch.Tensor, shard: ParameterShard, std: float, seed: int, name: str) -> None:
    box = shard.box(parameter.shape)
    parameter.zero_()
    tiles = [range(start // TILE, -(-stop // TILE)) for start, stop in box]
    for tile in itertools.product(*tiles):
        # The part of the tile inside the box: in coordinates of the tile and of the shard.
        first = [max(start, t * TILE) for t, (start, _) in zip(tile, box, strict=True)]
        last = [min(stop, (t + 1) * TILE) for t, (_, stop) in zip(tile, box, strict=True)]
        inside = tuple(slice(f - t * TILE, e - t * TILE) for f, e, t in zip(first, last, tile, strict=True))
        local = tuple(slice(f - start, e - start) for f, e, (start, _) in zip(first, last, box, strict=True))
        parameter[local] = torch.from_numpy(_normal_tile(seed, name, tile)[inside] * np.float32(std)).to(
            parameter.dtype
        )


def _normal_tile(seed: int, name: str, tile: tuple[int, ...]) -> np.ndarray:
    digest = hashlib.sha256(repr((seed, name, tile)).encode()).digest()
    # Not torch's generator: it keeps 32 bits of a CPU seed, and its values depend on the CPU's vector width.
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.standard_normal((TILE,) * len(tile), dtype=np.float32)

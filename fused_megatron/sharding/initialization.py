"""Initial weights that are the same for every way to shard them."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from fused_megatron.checks import check, has_values
from fused_megatron.sharding.box import Box, TensorBox
from fused_megatron.sharding.parameter_record import parameter_parts

# A full weight is drawn in square tiles with this edge, each from its own random stream (for experts [E, F, H] each
# matrix is cut into tiles). A rank draws only the tiles that its shard touches. Another edge would change every initial
# weight.
TILE = 256
MOST_STAGED = 1 << 24
"""Elements of the largest piece that is drawn in host memory, and then rounded and copied: 64 MiB of float32."""


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
    Memory: beside the parameter, a piece of it in host memory, of at most MOST_STAGED elements in float32 and in the
        dtype of the parameter, and a tile of TILE x TILE numbers a thread. One copy a piece, for which the host does
        not wait.
    """
    check(1 <= parameter.dim() <= 3, f"{name}: parameter.shape={tuple(parameter.shape)} must have 1 to 3 dims")
    if not has_values(parameter):
        return
    parameter.zero_()
    for part in parameter_parts(parameter):
        _fill(part.held(parameter), std, seed, part.full_name(name))


def _fill(held: TensorBox, std: float, seed: int, name: str) -> None:
    tensor = held.tensor.detach()
    threads = torch.get_num_threads() if tensor.is_cpu else max(torch.get_num_threads(), _share_of_cores())
    for piece in _pieces(held.box, MOST_STAGED):
        target = tensor[piece.slices(held.offset)]
        # Drawn and rounded on the host: a GPU's generator has other bits. The allocator of pinned memory keeps a buffer
        # until its copy is done, so that the host waits for no copy. Never numpy's view of a weight: torch does not
        # resize its memory afterwards.
        staged = torch.empty(target.shape, dtype=target.dtype, pin_memory=target.is_cuda)
        drawn = staged if target.dtype == torch.float32 else torch.empty(target.shape)
        _draw(drawn.numpy(), piece, std, seed, name, threads)
        if drawn is not staged:
            staged.copy_(drawn)
        target.copy_(staged, non_blocking=True)


def _pieces(box: Box, most: int) -> Iterator[Box]:
    """Cut a box along the edges of tiles, the first dim first, into pieces of at most `most` elements or one tile."""
    edges = _edges(box)
    spans = zip(box.offset, box.shape, edges, strict=True)
    cuts = [(o // edge + -(-(o + size) // edge)) // 2 * edge for o, size, edge in spans]
    inside = [dim for dim, cut in enumerate(cuts) if box.offset[dim] < cut < box.offset[dim] + box.shape[dim]]
    if box.volume <= most or not inside:
        yield box
        return
    dim = inside[0]
    offset, shape = list(box.offset), list(box.shape)
    shape[dim] = cuts[dim] - offset[dim]
    yield from _pieces(Box(tuple(offset), tuple(shape)), most)
    offset[dim], shape[dim] = cuts[dim], box.shape[dim] - shape[dim]
    yield from _pieces(Box(tuple(offset), tuple(shape)), most)


def _edges(box: Box) -> tuple[int, ...]:
    return (1, TILE, TILE)[-len(box.shape) :]


def _share_of_cores() -> int:
    """The cores of this process over the ranks of its machine; torchrun sets one thread a rank, whatever there is."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _draw(out: np.ndarray, box: Box, std: float, seed: int, name: str, threads: int) -> None:
    """Draw a box of the full weight. Each tile has its own random stream, so that threads can draw tiles in any order.

    Threads call numpy only: no_grad and the number of torch's threads belong to the thread that sets them.
    """
    edges = _edges(box)

    def draw(tile: tuple[int, ...]) -> None:
        tile_box = Box(tuple(i * edge for i, edge in zip(tile, edges, strict=True)), edges)
        if inside := tile_box.intersect(box):
            wanted = inside.slices(tile_box.offset)
            values = _normal_rows(seed, name, tile, edges, wanted)[wanted]
            np.multiply(values, np.float32(std), out=out[inside.slices(box.offset)])

    spans = zip(box.offset, box.shape, edges, strict=True)
    tiles = list(itertools.product(*(range(o // edge, -(-(o + size) // edge)) for o, size, edge in spans)))
    if threads == 1 or len(tiles) <= 1:
        for tile in tiles:
            draw(tile)
        return
    with ThreadPoolExecutor(min(threads, len(tiles))) as pool:
        for _ in pool.map(draw, tiles):
            pass


def _normal_rows(
    seed: int, name: str, tile: tuple[int, ...], edges: tuple[int, ...], wanted: tuple[slice, ...]
) -> np.ndarray:
    """Draw the rows of a tile down to the last wanted one. Numbers come row by row, so the rest is not drawn."""
    digest = hashlib.sha256(repr((seed, name, tile)).encode()).digest()
    # Not torch's generator: it keeps 32 bits of a CPU seed, and its values depend on the CPU's vector width.
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    dim = max(0, len(edges) - 2)
    return generator.standard_normal((*edges[:dim], wanted[dim].stop, *edges[dim + 1 :]), dtype=np.float32)

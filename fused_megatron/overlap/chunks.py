"""Where the rows of a product are cut into chunks."""

import itertools
from math import gcd

import torch

# Rows of a tile of the GPU's matrix products: a chunk that ends inside one would compute the rest for nothing.
_TILE_ROWS = 128


def chunk_parts(num_chunks: int) -> list[float]:
    """The share of each chunk: rising from the first to the middle and falling to the last.

    What nothing hides is the first chunk's product and the last one's transfer: of 8 chunks a fourteenth each, where
    equal chunks would leave an eighth. They grow slowly: none is over long before the other side's next is there.
    """
    weights = [2 + min(i, num_chunks - 1 - i) for i in range(num_chunks)]
    return [weight / sum(weights) for weight in weights]


def chunk_edges(length: int, num_chunks: int, multiple: int = 1) -> list[tuple[int, int]]:
    """[begin, end) of at most num_chunks chunks, short ones at both ends, which begin at multiples of `multiple`.

    Nothing hides the first product, nor the last transfer: so they are the shortest; see chunk_parts.
    Never empty: a length of 0 is one empty chunk, so that every rank issues at least one collective.
    """
    units = -(-length // multiple)
    count = max(1, min(num_chunks, units))
    # One unit for each chunk, and the rest in proportion.
    ends = [i + 1 + int((units - count) * done) for i, done in enumerate(itertools.accumulate(chunk_parts(count)))]
    ends = [min(length, end * multiple) for end in ends[:-1]] + [length]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def tile_steps(x: torch.Tensor, rows_per_step: int) -> int:
    """Steps of a dim that make whole tiles of rows."""
    return _TILE_ROWS // gcd(_TILE_ROWS, max(1, rows_per_step)) if x.device.type != "cpu" else 1

"""Boundaries of the chunks into which the rows of a product are cut."""

import itertools
from math import gcd

import torch

# Rows of a tile of the GPU's matrix products. A chunk that ends inside a tile computes the rest of it in vain.
_TILE_ROWS = 128


def chunk_parts(num_chunks: int) -> list[float]:
    """Return the share of each chunk of the rows: rising from the first to the middle, and falling to the last.

    Nothing hides the product of the first chunk and the transfer of the last: with 8 chunks a fourteenth of each, where
    equal chunks would leave an eighth. The shares rise slowly, so that products and transfers keep pace.
    """
    weights = [2 + min(i, num_chunks - 1 - i) for i in range(num_chunks)]
    return [weight / sum(weights) for weight in weights]


def chunk_edges(length: int, num_chunks: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Return [begin, end) of at most num_chunks chunks, which begin at multiples of `multiple`.

    The first and the last chunk are the shortest, since nothing hides the first product and the last transfer; see
    chunk_parts. A length of 0 gives one empty chunk, so that every rank issues at least one collective.
    """
    units = -(-length // multiple)
    count = max(1, min(num_chunks, units))
    # One unit for each chunk, and the rest in proportion.
    ends = [i + 1 + int((units - count) * done) for i, done in enumerate(itertools.accumulate(chunk_parts(count)))]
    ends = [min(length, end * multiple) for end in ends[:-1]] + [length]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def tile_steps(x: torch.Tensor, rows_per_step: int) -> int:
    """Return the least number of steps of a dim that fill whole tiles, if a step has rows_per_step rows; 1 on a CPU."""
    return _TILE_ROWS // gcd(_TILE_ROWS, max(1, rows_per_step)) if x.device.type != "cpu" else 1

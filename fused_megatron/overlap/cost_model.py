"""Cost model that finds the best number of chunks of a product and its collective, by arithmetic only.

Without chunks the time is product + transfer. In chunks the two run side by side, except the first product and the last
transfer, whose chunks are short for that reason. Each further message costs its latency, each further product reads its
weight again, and a transfer may take cores from the product beside it. So more chunks hide more and cost more. The
model simulates a step for every number of chunks, from five measured numbers of the group, and takes the best.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from fused_megatron.overlap.chunks import chunk_parts

_CHUNK_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
# Below this predicted gain there is one chunk only: a model this small is no more accurate.
_LEAST_GAIN = 0.03
# Products with fewer rows run at a lower rate than the model assumes.
_LEAST_ROWS = 64


class Stretch(NamedTuple):
    """Times of a product and its transfers over all chunks, in seconds without latency.

    Attributes:
        product_s: time of the product.
        reduce_s: time of the transfers that wait for the product of their chunk.
        gather_s: time of the transfers that the product of their chunk waits for.
        before_s: time of a product that waits for nothing; without chunks it waits for the gather, too.
        after_s: time of a product that no transfer waits for.
    """

    product_s: float
    reduce_s: float = 0.0
    gather_s: float = 0.0
    before_s: float = 0.0
    after_s: float = 0.0


@dataclass(frozen=True)
class OverlapCosts:
    """Measured costs of the ranks of a group; the same on every rank.

    Attributes:
        flops_per_s: rate of a matrix product in the dtype of the activations, on the slowest rank.
        latency_s: time of an all-reduce of 4 bytes.
        bytes_per_s: bytes of the tensor that an all-reduce sums in a second, in the limit of large tensors.
        weight_s: time that a product takes to read an element of its weight, for any number of rows.
        reads_beside: whether a product computes while it reads its weight (a GPU), and not after that (a CPU).
        slowdown: seconds that a product loses for each second of a transfer beside it: 0 if the two share nothing, 1
            if the transfer takes the same cores.
        symmetric_memory: whether the ranks map each other's memory, for torch's fused products.
    """

    flops_per_s: float
    latency_s: float
    bytes_per_s: float
    weight_s: float = 0.0
    slowdown: float = 0.0
    symmetric_memory: bool = False
    reads_beside: bool = False

    def step_s(self, stretches: Sequence[Stretch], num_chunks: int, weight_elements: int = 0) -> float:
        """Return the time of all stretches in this many chunks; other arguments as num_chunks()."""
        again_s = weight_elements * self.weight_s if num_chunks > 1 else 0.0
        return sum(self._stretch_s(stretch, chunk_parts(num_chunks), again_s) for stretch in stretches)

    def num_chunks(self, stretches: Sequence[Stretch], rows: int, weight_elements: int = 0) -> int:
        """Return the number of chunks with the least total time of all stretches.

        Args:
            stretches: products with their transfers, which run one after the other.
            rows: rows of the products; they bound the number of chunks.
            weight_elements: elements of the weight that each chunk of a product reads.
        """
        step_s = partial(self.step_s, stretches, weight_elements=weight_elements)
        possible = [c for c in _CHUNK_COUNTS if c == 1 or rows * chunk_parts(c)[0] >= _LEAST_ROWS]
        best = min(possible, key=step_s)
        return best if step_s(best) < (1 - _LEAST_GAIN) * step_s(1) else 1

    def _stretch_s(self, stretch: Stretch, parts: list[float], again_s: float) -> float:
        gathered = [0.0] * len(parts)
        if stretch.gather_s:
            gathered = list(itertools.accumulate(self.latency_s + stretch.gather_s * part for part in parts))
            gathered = [*gathered[1:], gathered[-1]]  # all are issued at once, and gloo sends two at a time
        link_s, product_s = gathered[-1], stretch.before_s + self.slowdown * stretch.gather_s
        if len(parts) == 1:  # the whole is multiplied at once, after the gather
            product_s = gathered[-1] + stretch.before_s
        for ready_s, part in zip(gathered, parts, strict=True):
            chunk_s = stretch.product_s * part
            product_s = max(product_s, ready_s) + (max(again_s, chunk_s) if self.reads_beside else again_s + chunk_s)
            if stretch.reduce_s:
                link_s = max(link_s, product_s) + self.latency_s + stretch.reduce_s * part
                product_s += self.slowdown * stretch.reduce_s * part
        return max(link_s, product_s + stretch.after_s)

"""Into how many chunks a product and its collective are best cut: a small cost model, pure arithmetic.

The plain path takes product + transfer. In chunks the two run side by side, but for the first chunk of one and the last
of the other, which are cut short for that; every further message costs its latency, every further product reads its
weight again, and a transfer may take cores from the product beside it. More chunks hide more and cost more; the model
plays a step for every number of chunks, from five measured numbers of the group, and takes the best.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fused_megatron.overlap.chunks import chunk_parts

_CHUNK_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
# Below this predicted gain the plain path is taken: a model this small is not right to more.
_LEAST_GAIN = 0.03
# Products thinner than this run at a lower rate than the model believes.
_LEAST_ROWS = 64


class Stretch(NamedTuple):
    """A product with its transfers, in one piece; seconds without latency.

    Attributes:
        product_s: of all chunks.
        reduce_s: transfers that each wait for the product of their chunk.
        gather_s: transfers that the product of their chunk waits for.
        before_s: a product that waits for nothing.
        after_s: a product that no transfer waits for.
    """

    product_s: float
    reduce_s: float = 0.0
    gather_s: float = 0.0
    before_s: float = 0.0
    after_s: float = 0.0


@dataclass(frozen=True)
class OverlapCosts:
    """What the ranks of a group measured; the same on each of them.

    Attributes:
        flops_per_s: of a matrix product in the dtype of the activations, of the slowest rank.
        latency_s: of an all-reduce of nothing.
        bytes_per_s: bytes of an all-reduced tensor a second, in the limit of large ones.
        weight_s: of a product, for each element of its weight, however few rows it has.
        slowdown: seconds that a product takes longer for each second of a transfer beside it: 0 where the two share
            nothing, 1 where a transfer is all work for the same cores.
        symmetric_memory: whether the ranks map each other's memory, for torch's fused products.
    """

    flops_per_s: float
    latency_s: float
    bytes_per_s: float
    weight_s: float = 0.0
    slowdown: float = 0.0
    symmetric_memory: bool = False

    def num_chunks(self, stretches: Sequence[Stretch], rows: int, weight_elements: int = 0) -> int:
        """The best number of chunks for all of these stretches.

        Args:
            stretches: what the number is used for, one after the other.
            rows: of the products; what bounds the number of chunks.
            weight_elements: that each chunk of a product reads.
        """

        def step_s(chunks: int) -> float:
            again_s = weight_elements * self.weight_s if chunks > 1 else 0.0
            return sum(self._stretch_s(stretch, chunk_parts(chunks), again_s) for stretch in stretches)

        possible = [c for c in _CHUNK_COUNTS if c == 1 or rows * chunk_parts(c)[0] >= _LEAST_ROWS]
        best = min(possible, key=step_s)
        return best if step_s(best) < (1 - _LEAST_GAIN) * step_s(1) else 1

    def _stretch_s(self, stretch: Stretch, parts: list[float], again_s: float) -> float:
        gathered = [0.0] * len(parts)
        if stretch.gather_s:
            gathered = list(itertools.accumulate(self.latency_s + stretch.gather_s * part for part in parts))
            gathered = [*gathered[1:], gathered[-1]]  # all are issued at once, and gloo sends two of them at a time
        link_s, product_s = gathered[-1], stretch.before_s + self.slowdown * stretch.gather_s
        for ready_s, part in zip(gathered, parts, strict=True):
            product_s = max(product_s, ready_s) + again_s + stretch.product_s * part
            if stretch.reduce_s:
                link_s = max(link_s, product_s) + self.latency_s + stretch.reduce_s * part
                product_s += self.slowdown * stretch.reduce_s * part
        return max(link_s, product_s + stretch.after_s)

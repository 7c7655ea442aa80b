"""Into how many chunks a product and its collective are cut: a small cost model, measured once a group.

The plain path takes product + transfer. In c chunks the two run side by side, but for the first chunk of one and the
last of the other, and every further message costs its latency. More chunks hide more and cost more; the model knows
three numbers of the group (flops a second of a product, latency and bytes a second of a message) and takes the best.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fused_megatron.checks import check
from fused_megatron.collectives.groups import Group, group_size

_CHUNK_COUNTS = (1, 2, 4, 8, 16)
# Below this predicted gain the plain path is taken: a model this small is not right to more.
_LEAST_GAIN = 0.03
# Products thinner than this run at a lower rate than the model believes.
_LEAST_ROWS = 64


@dataclass(frozen=True)
class OverlapCosts:
    """What the ranks of a group measured; the same on each of them.

    Attributes:
        flops_per_s: of a matrix product in the dtype of the activations, of the slowest rank.
        latency_s: of an all-reduce of nothing.
        bytes_per_s: bytes of an all-reduced tensor a second, in the limit of large ones.
    """

    flops_per_s: float
    latency_s: float
    bytes_per_s: float

    def num_chunks(self, product_s: float, transfer_s: float, hidden_products: int, rows: int) -> int:
        """The best number of chunks for a product and a transfer of these times.

        Args:
            product_s: the product that the transfer belongs to.
            transfer_s: its collective, in one piece, without latency.
            hidden_products: 1, or 2 where a product of the same size follows that the collective may run under.
            rows: of the product; what bounds the number of chunks.
        """

        def step_s(chunks: int) -> float:
            first_product, transfers = product_s / chunks, chunks * self.latency_s + transfer_s
            # After the last product its own transfer is left, unless another product follows to hide it.
            last_transfer = transfers / chunks if hidden_products == 1 else 0.0
            return max(first_product + transfers, hidden_products * product_s + last_transfer)

        possible = [c for c in _CHUNK_COUNTS if c == 1 or rows >= c * _LEAST_ROWS]
        best = min(possible, key=step_s)
        return best if step_s(best) < (1 - _LEAST_GAIN) * step_s(1) else 1


@dataclass(frozen=True)
class ChunkChoice:
    """How a linear layer picks its number of chunks.

    Attributes:
        fixed: this many, always; None: what the cost model of the group says.
    """

    fixed: int | None = None

    def __post_init__(self) -> None:
        check(self.fixed is None or self.fixed >= 1, f"overlap={self.fixed} must be at least 1 chunk")

    def for_reduction(self, x: torch.Tensor, out_features: int, group: Group, hidden_products: int = 1) -> int:
        """Chunks of x [.., I] @ [I, O] whose result is summed over the ranks (or scattered as it is summed)."""
        return self._choose(
            x, x.numel() * out_features, x.numel() // max(1, x.shape[-1]) * out_features, group, hidden_products
        )

    def for_gather(self, x: torch.Tensor, out_features: int, group: Group) -> int:
        """Chunks of the product with x [.., I] of all ranks, gathered."""
        ranks = group_size(group)
        # An all-gather is half of an all-reduce, whose speed was measured.
        return self._choose(x, ranks * x.numel() * out_features, ranks * x.numel() // 2, group, 1)

    def for_mlp(self, x: torch.Tensor, multiply_adds: int, group: Group, hidden_products: int) -> int:
        """Chunks of rows that go through both products of an MLP before their sum over the ranks."""
        return self._choose(x, multiply_adds, x.numel(), group, hidden_products)

    def _choose(self, x: torch.Tensor, multiply_adds: int, elements: int, group: Group, hidden_products: int) -> int:
        if group_size(group) == 1 or x.numel() == 0:
            return 1
        if self.fixed is not None:
            return self.fixed
        costs = overlap_costs(group, x.dtype, x.device)
        product_s = 2 * multiply_adds / costs.flops_per_s
        transfer_s = elements * x.element_size() / costs.bytes_per_s
        return costs.num_chunks(product_s, transfer_s, hidden_products, x.numel() // x.shape[-1])


PLAIN = ChunkChoice(1)
"""Whole products and whole collectives."""
AUTO = ChunkChoice(None)
"""What the cost model says."""


def chunk_choice(overlap: bool | int) -> ChunkChoice:
    """What users pass as overlap: True for the cost model, False for the plain path, or a number of chunks.

    Raises:
        InputError: a number below 1.
    """
    if isinstance(overlap, bool):
        return AUTO if overlap else PLAIN
    return ChunkChoice(overlap)


@functools.lru_cache(maxsize=64)
def overlap_costs(group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> OverlapCosts:
    """Measure a group once; all its ranks must call it at the same point, as layers do when they are made.

    About 20 ms of messages and products on a laptop.

    Communication: 12 all-reduces of 4 bytes, 4 of 1 MiB, one of 24 bytes.
    """
    latency_s = _seconds(lambda x: dist.all_reduce(x, group=group), torch.zeros(1, device=device), repeats=10)
    message = torch.zeros(1 << 18, device=device)
    message_s = _seconds(lambda x: dist.all_reduce(x, group=group), message, repeats=3)
    size = 2048 if device.type == "cuda" else 256
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    product_s = _seconds(lambda x: torch.mm(x, x), matrix, repeats=5)
    # The slowest rank sets the pace of all; and all must choose alike.
    slowest = torch.tensor([latency_s, message_s, product_s], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    latency_s, message_s, product_s = slowest.tolist()
    streaming_s = max(message_s - latency_s, 1e-9)
    return OverlapCosts(2 * size**3 / product_s, latency_s, message.numel() * message.element_size() / streaming_s)


def _seconds(work: Callable[[torch.Tensor], object], x: torch.Tensor, repeats: int) -> float:
    """The least time of some calls; the first warms up."""
    best = math.inf
    for _ in range(repeats + 1):
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best

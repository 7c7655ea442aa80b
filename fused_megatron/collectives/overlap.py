"""Into how many chunks a product and its collective are cut: a small cost model, measured once a group.

The plain path takes product + transfer. In c chunks the two run side by side, but for the first chunk of one and the
last of the other; every further message costs its latency, and every further product reads its weight again. More
chunks hide more and cost more; the model knows four numbers of the group (flops a second of a product and what a weight
costs it, latency and bytes a second of a message) and takes the best.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fused_megatron.checks import check
from fused_megatron.collectives.groups import Group, group_size

_LOG = logging.getLogger(__name__)
_CHUNK_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
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
        weight_s: of a product, for each element of its weight, however few rows it has.
    """

    flops_per_s: float
    latency_s: float
    bytes_per_s: float
    weight_s: float = 0.0

    def num_chunks(
        self, product_s: float, transfer_s: float, hidden_products: Sequence[int], rows: int, weight_elements: int = 0
    ) -> int:
        """The best number of chunks for a product and a transfer of these times.

        Args:
            product_s: the product that the transfer belongs to.
            transfer_s: its collective, in one piece, without latency.
            hidden_products: 1, or 2 where a product of the same size follows that the collective may run under; one
                for each time that this number of chunks is used.
            rows: of the product; what bounds the number of chunks.
            weight_elements: that each chunk of the product reads.
        """

        def step_s(chunks: int) -> float:
            products_s = product_s + (chunks - 1) * weight_elements * self.weight_s
            transfers_s = chunks * self.latency_s + transfer_s
            total_s = 0.0
            for hidden in hidden_products:
                # After the last product its own transfer is left, unless another product follows to hide it.
                last_s = transfers_s / chunks if hidden == 1 else 0.0
                all_products_s = products_s + (hidden - 1) * product_s
                total_s += max(products_s / chunks + transfers_s, all_products_s + last_s)
            return total_s

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

    def for_reduction(self, x: torch.Tensor, weight: torch.Tensor, group: Group, hidden_products: int = 1) -> int:
        """Chunks of x [.., I] @ weight [O, I].T whose result is summed over the ranks or reduce-scattered."""
        elements = x.numel() // max(1, x.shape[-1]) * weight.shape[0]
        return self._choose(x, x.numel() * weight.shape[0], elements, group, (hidden_products,), weight.numel())

    def for_gather(self, x: torch.Tensor, weight: torch.Tensor, group: Group) -> int:
        """Chunks of the product with x [.., I] of all ranks, gathered."""
        ranks = group_size(group)
        # An all-gather is half of an all-reduce, whose speed was measured.
        return self._choose(
            x, ranks * x.numel() * weight.shape[0], ranks * x.numel() // 2, group, (1,), ranks * weight.numel()
        )

    def for_mlp(self, x: torch.Tensor, ranks: int, weight_elements: int, group: Group) -> int:
        """Chunks of rows that go through both products of an MLP, forward and backward; x is one of `ranks` shards."""
        rows = ranks * (x.numel() // max(1, x.shape[-1]))
        return self._choose(x, rows * weight_elements, ranks * x.numel(), group, (1, 2), weight_elements)

    def _choose(
        self,
        x: torch.Tensor,
        multiply_adds: int,
        elements: int,
        group: Group,
        hidden_products: Sequence[int],
        weight_elements: int,
    ) -> int:
        if group_size(group) == 1 or x.numel() == 0 or x.is_meta:
            return 1
        if self.fixed is not None:
            return self.fixed
        costs = overlap_costs(group, x.dtype, x.device)
        product_s = 2 * multiply_adds / costs.flops_per_s
        transfer_s = elements * x.element_size() / costs.bytes_per_s
        rows = x.numel() // x.shape[-1]
        num_chunks = costs.num_chunks(product_s, transfer_s, hidden_products, rows, weight_elements)
        _log_once(
            f"overlap over {group_size(group)} ranks: {rows} rows in {num_chunks} chunks "
            f"(product {1e3 * product_s:.2g} ms, transfer {1e3 * transfer_s:.2g} ms)"
        )
        return num_chunks

    def __str__(self) -> str:
        """For extra_repr."""
        return {None: "auto", 1: "off"}.get(self.fixed, f"{self.fixed} chunks")


@functools.lru_cache(maxsize=1024)
def _log_once(line: str) -> None:
    _LOG.info(line)


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

    About 50 ms of messages and products on a laptop.

    Communication: 12 all-reduces of 4 bytes, 4 of 1 MiB, one of 32 bytes.
    """
    latency_s = _seconds(lambda x: dist.all_reduce(x, group=group), torch.zeros(1, device=device), repeats=10)
    message = torch.zeros(1 << 18, device=device)
    message_s = _seconds(lambda x: dist.all_reduce(x, group=group), message, repeats=3)
    size, few, many = (4096, 512, 4096) if device.type == "cuda" else (1024, 128, 512)
    weight = torch.ones(size, size, dtype=dtype, device=device)
    few_s, many_s = (
        _seconds(lambda x: torch.mm(x, weight.t()), torch.ones(rows, size, dtype=dtype, device=device), repeats=3)
        for rows in (few, many)
    )
    # The slowest rank sets the pace of all; and all must choose alike.
    slowest = torch.tensor([latency_s, message_s, few_s, many_s], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    latency_s, message_s, few_s, many_s = slowest.tolist()
    streaming_s = max(message_s - latency_s, 1e-9)
    # many_s = a + b many, few_s = a + b few: a is the weight's. Noise must not make it negative, nor all of the time.
    weight_s = min(max(0.0, (few_s - many_s * few / many) / (1 - few / many)), 0.5 * few_s)
    return OverlapCosts(
        2 * many * size**2 / (many_s - weight_s),
        latency_s,
        message.numel() * message.element_size() / streaming_s,
        weight_s / size**2,
    )


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

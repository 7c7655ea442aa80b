"""Into how many chunks a product and its collective are cut: a small cost model, measured once a group.

The plain path takes product + transfer. In chunks the two run side by side, but for the first chunk of one and the last
of the other, which are cut short for that; every further message costs its latency, every further product reads its
weight again, and a transfer may take cores from the product beside it. More chunks hide more and cost more; the model
plays a step for every number of chunks, from five measured numbers of the group, and takes the best.
"""

import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from fused_megatron.checks import check
from fused_megatron.collectives.groups import Group, group_size
from fused_megatron.collectives.transport.shared_memory import is_shared
from fused_megatron.collectives.transport.transfer import Transfer, start
from fused_megatron.ops.product import product
from fused_megatron.overlap.symmetric_memory import applies, reaches

_LOG = logging.getLogger(__name__)
_CHUNK_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
# Below this predicted gain the plain path is taken: a model this small is not right to more.
_LEAST_GAIN = 0.03
# Products thinner than this run at a lower rate than the model believes.
_LEAST_ROWS = 64
BY_SYMMETRIC_MEMORY = 0
"""In place of a number of chunks: torch's fused op, see symmetric_memory."""


def chunk_parts(num_chunks: int) -> list[float]:
    """The share of each chunk: rising from the first to the middle and falling to the last.

    What nothing hides is the first chunk's product and the last one's transfer: of 8 chunks a fourteenth each, where
    equal chunks would leave an eighth. They grow slowly: none is over long before the other side's next is there.
    """
    weights = [2 + min(i, num_chunks - 1 - i) for i in range(num_chunks)]
    return [weight / sum(weights) for weight in weights]


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


@dataclass(frozen=True)
class ChunkChoice:
    """How a linear layer picks its number of chunks.

    Attributes:
        fixed: this many, always; None: what the cost model of the group says.
    """

    fixed: int | None = None

    def __post_init__(self) -> None:
        check(self.fixed is None or self.fixed >= 1, f"overlap={self.fixed} must be at least 1 chunk")

    def for_reduction(
        self, x: torch.Tensor, weight: torch.Tensor, dim: int | None, group: Group, hidden_products: int = 1
    ) -> int:
        """Chunks of x [.., I] @ weight [O, I].T whose result is summed over the ranks, or reduce-scattered over dim.

        hidden_products: 2 where a product of the same size follows that the collective may run under.
        """
        rows = x.numel() // max(1, x.shape[-1])

        def stretches(product_s: float, bytes_s: float) -> list[Stretch]:
            whole_s = rows * weight.numel() * product_s
            return [Stretch(whole_s, rows * weight.shape[0] * bytes_s, after_s=(hidden_products - 1) * whole_s)]

        return self._choose(x, stretches, rows, group, weight.numel(), applies(x, dim))

    def for_gather(self, x: torch.Tensor, weight: torch.Tensor, dim: int, group: Group) -> int:
        """Chunks of the product with x [.., I] of all ranks, gathered along dim."""
        ranks, rows = group_size(group), x.numel() // max(1, x.shape[-1])

        def stretches(product_s: float, bytes_s: float) -> list[Stretch]:
            own_s = rows * weight.numel() * product_s
            # An all-gather is half of an all-reduce, whose speed was measured.
            gather_s = ranks * x.numel() * bytes_s / 2
            return [Stretch((ranks - 1) * own_s, gather_s=gather_s, before_s=own_s)]

        return self._choose(x, stretches, rows, group, (ranks - 1) * weight.numel(), applies(x, dim))

    def for_mlp(self, x: torch.Tensor, ranks: int, weight_elements: int, group: Group) -> tuple[int, int]:
        """Chunks of rows that go through both products of an MLP, forward and backward; x is one of `ranks` shards.

        With shards both numbers are the same: the chunks order the rows of what forward keeps.
        """
        rows = ranks * (x.numel() // max(1, x.shape[-1]))

        gathered = 0.5 if ranks > 1 else 0.0  # of what a sum over the ranks sends; a reduce-scatter is as much

        def forward(product_s: float, bytes_s: float) -> list[Stretch]:
            whole_s, sum_s = rows * weight_elements * product_s, rows * x.shape[-1] * bytes_s
            return [Stretch(whole_s, (1 - gathered) * sum_s, gathered * sum_s)]

        def backward(product_s: float, bytes_s: float) -> list[Stretch]:
            whole_s, sum_s = rows * weight_elements * product_s, rows * x.shape[-1] * bytes_s
            # x is gathered again, too, before the sums; where in the queue of transfers does not matter.
            return [Stretch(whole_s, sum_s, gathered * sum_s, after_s=whole_s)]

        if ranks > 1:
            both = self._choose(x, lambda *costs: forward(*costs) + backward(*costs), rows, group, weight_elements)
            return both, both
        return (
            self._choose(x, forward, rows, group, weight_elements),
            self._choose(x, backward, rows, group, weight_elements),
        )

    def _choose(
        self,
        x: torch.Tensor,
        stretches: Callable[[float, float], list[Stretch]],
        rows: int,
        group: Group,
        weight_elements: int,
        fusable: bool = False,
    ) -> int:
        """stretches: from the seconds of a multiplication and addition, and of an element of an all-reduce."""
        if group_size(group) == 1 or x.numel() == 0:
            return 1
        costs = self.measured(group, x)
        if costs is None:
            return self.fixed or 1
        steps = stretches(2 / costs.flops_per_s, x.element_size() / costs.bytes_per_s)
        num_chunks = costs.num_chunks(steps, rows, weight_elements)
        how = f"in {num_chunks} chunks"
        if num_chunks > 1 and fusable and costs.symmetric_memory:
            num_chunks, how = BY_SYMMETRIC_MEMORY, "by symmetric memory"
        _log_once(
            f"overlap over {group_size(group)} ranks{_nccl_share(group, x.device)}: {rows} rows {how} "
            f"(product {1e3 * steps[0].product_s:.2g} ms, "
            f"transfer {1e3 * (steps[0].gather_s + steps[0].reduce_s):.2g} ms)"
        )
        return num_chunks

    def prefers_layers(self, x: torch.Tensor, dim: int | None, group: Group) -> bool:
        """Whether the layers of an MLP, each with its fused ops, go before chunks of rows through both."""
        if x.numel() == 0 or not applies(x, dim):
            return False
        costs = self.measured(group, x)
        return costs is not None and costs.symmetric_memory

    def measured(self, group: Group, like: torch.Tensor) -> OverlapCosts | None:
        """What the group measured for such tensors, now or before; None where nothing is to choose, or to be timed."""
        if self.fixed is not None or group is None or group_size(group) == 1 or like.is_meta:
            return None
        return overlap_costs(group, like.dtype, like.device)

    def __str__(self) -> str:
        """For extra_repr."""
        return {None: "auto", 1: "off"}.get(self.fixed, f"{self.fixed} chunks")


def _nccl_share(group: Group, device: torch.device) -> str:
    """The most SMs that NCCL takes from the products, as init_mesh set it, for the log line."""
    if group is None or device.type != "cuda":
        return ""
    config = getattr(getattr(group._get_backend(device), "options", None), "config", None)
    most = getattr(config, "max_ctas", 0)
    return f", at most {most} SMs for NCCL" if 0 < most < 1024 else ""  # NCCL's own default is "undefined"


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

    About 200 ms of messages and products on a laptop.

    Communication: 11 all-reduces of 4 bytes, 9 of 2 MiB, one of 40 bytes; see symmetric_memory.reaches.
    """
    check(
        device.type != "cuda" or not torch.cuda.is_current_stream_capturing(),
        "overlap=True measures the group at its first step, which a CUDA graph cannot capture (run a step before the "
        "capture, or pass a number of chunks)",
    )

    def all_reduce(x: torch.Tensor) -> None:
        start(dist.all_reduce, group, x).wait()

    latency_s = _seconds(all_reduce, torch.zeros(1, device=device), repeats=10)
    message = torch.zeros(1 << 19, device=device)
    message_s = _seconds(all_reduce, message, repeats=3)
    size, few, many = (4096, 512, 4096) if device.type == "cuda" else (1024, 64, 1024)
    weight = torch.ones(size, size, dtype=dtype, device=device)
    few_x, many_x = (torch.ones(rows, size, dtype=dtype, device=device) for rows in (few, many))
    few_s, many_s = (_seconds(lambda x: product(x, weight), x, repeats=6) for x in (few_x, many_x))

    def beside(x: torch.Tensor) -> Transfer:
        transfer = start(dist.all_reduce, group, message)
        product(x, weight)
        return transfer

    beside_s = _seconds(beside, many_x, repeats=4)
    # The slowest rank sets the pace of all; and all must choose alike.
    slowest = torch.tensor([latency_s, message_s, few_s, many_s, beside_s], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    latency_s, message_s, few_s, many_s, beside_s = slowest.tolist()
    streaming_s = max(message_s - latency_s, 1e-9)
    # Through shared memory a transfer is the work of this very thread, half of it when it waits.
    slowdown = 1.0 if is_shared(group, message) else (beside_s - many_s) / min(message_s, many_s)
    # many_s = a + b many, few_s = a + b few: a is the weight's. Noise must not make it negative, nor all of the time.
    weight_s = min(max(0.0, (few_s - many_s * few / many) / (1 - few / many)), 0.5 * few_s)
    return OverlapCosts(
        2 * many * size**2 / (many_s - weight_s),
        latency_s,
        message.numel() * message.element_size() / streaming_s,
        weight_s / size**2,
        min(max(0.0, slowdown), 1.0),
        reaches(group, device),
    )


def _seconds(work: Callable[[torch.Tensor], object], x: torch.Tensor, repeats: int) -> float:
    """The least time of some calls; the first warms up. A transfer that a call leaves under way is not counted."""
    best = math.inf
    for _ in range(repeats + 1):
        if x.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        left = work(x)
        if x.is_cuda:
            torch.cuda.current_stream().synchronize()
        best = min(best, time.perf_counter() - begin)
        if isinstance(left, Transfer):
            left.wait()
    return best

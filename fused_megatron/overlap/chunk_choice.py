"""Number of chunks of a layer: a fixed number, or the choice of a cost model that measures the group once.

The cost model runs once for every shape; later calls look the number up.
"""

import functools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fused_megatron.checks import check
from fused_megatron.collectives.groups import Group, group_size
from fused_megatron.collectives.transfers import Transfer, start_all_reduce_
from fused_megatron.collectives.transport.select import is_shared
from fused_megatron.ops.product import product
from fused_megatron.overlap.cost_model import OverlapCosts, Stretch
from fused_megatron.overlap.symmetric_memory import applies, reaches

_LOG = logging.getLogger(__name__)
BY_SYMMETRIC_MEMORY = 0
"""Stands for torch's fused op in place of a number of chunks; see symmetric_memory."""


@dataclass(frozen=True)
class ChunkChoice:
    """Rule by which a linear layer chooses its number of chunks.

    Attributes:
        fixed: the number of chunks; None lets the cost model of the group choose.
    """

    fixed: int | None = None

    def __post_init__(self) -> None:
        check(self.fixed is None or self.fixed >= 1, f"overlap={self.fixed} must be at least 1 chunk")

    def for_reduction(
        self, x: torch.Tensor, weight: torch.Tensor, dim: int | None, group: Group, hidden_products: int = 1
    ) -> int:
        """Choose the number of chunks of x [.., I] @ weight [O, I].T, whose result is summed over the ranks.

        Args:
            x: operand, this rank's.
            weight: operand, this rank's.
            dim: the dim over which the sum is scattered; None for an all-reduce.
            group: the ranks.
            hidden_products: 2 if a product of the same size follows, under which the collective may run; else 1.
        """
        if group_size(group) == 1 or x.numel() == 0:
            return 1
        costs = self.measured(group, x)
        if costs is None:
            return self.fixed or 1
        rows, elements = _rows(x), weight.numel()
        product_s = rows * elements * (2 / costs.flops_per_s)
        sum_s = rows * weight.shape[0] * (x.element_size() / costs.bytes_per_s)
        stretch = Stretch(product_s, sum_s, after_s=(hidden_products - 1) * product_s)
        assert group is not None
        fused = costs.symmetric_memory and applies(x, dim)
        return _num_chunks(costs, (stretch,), rows, elements, group, x.device, fused)

    def for_gather(self, x: torch.Tensor, weight: torch.Tensor, dim: int, group: Group) -> int:
        """Choose the number of chunks of x @ weight [O, I].T, where x [.., I] of all ranks is gathered along dim."""
        if group_size(group) == 1 or x.numel() == 0:
            return 1
        costs = self.measured(group, x)
        if costs is None:
            return self.fixed or 1
        ranks, rows, elements = group_size(group), _rows(x), weight.numel()
        own_s = rows * elements * (2 / costs.flops_per_s)
        # An all-gather moves half the bytes of an all-reduce, whose speed was measured.
        gather_s = ranks * x.numel() * (x.element_size() / costs.bytes_per_s) / 2
        stretch = Stretch((ranks - 1) * own_s, gather_s=gather_s, before_s=own_s)
        assert group is not None
        fused = costs.symmetric_memory and applies(x, dim)
        return _num_chunks(costs, (stretch,), rows, (ranks - 1) * elements, group, x.device, fused)

    def for_mlp(self, x: torch.Tensor, ranks: int, weight_elements: int, group: Group) -> tuple[int, int]:
        """Choose the numbers of chunks of rows that go through both products of an MLP: (forward, backward).

        x is one of `ranks` sequence shards, or replicated (ranks=1). With shards both numbers are the same, since the
        chunks define the order of the rows that forward saves.
        """
        if group_size(group) == 1 or x.numel() == 0:
            return 1, 1
        costs = self.measured(group, x)
        if costs is None:
            return self.fixed or 1, self.fixed or 1
        assert group is not None
        rows = ranks * _rows(x)
        gathered = 0.5 if ranks > 1 else 0.0  # an all-gather, or a reduce-scatter, sends half of an all-reduce
        products_s = rows * weight_elements * (2 / costs.flops_per_s)
        sum_s = rows * x.shape[-1] * (x.element_size() / costs.bytes_per_s)
        forward = Stretch(products_s, (1 - gathered) * sum_s, gathered * sum_s)
        # Backward gathers x again, before the sums. Its order in the queue of transfers does not matter.
        backward = Stretch(products_s, sum_s, gathered * sum_s, after_s=products_s)
        if ranks > 1:
            both = _num_chunks(costs, (forward, backward), rows, weight_elements, group, x.device)
            return both, both
        return (
            _num_chunks(costs, (forward,), rows, weight_elements, group, x.device),
            _num_chunks(costs, (backward,), rows, weight_elements, group, x.device),
        )

    def for_exchange(self, x: torch.Tensor, num_rows: int, weight_elements: int, group: Group) -> int:
        """Choose the number of parts of the experts of a rank, whose rows ranks exchange before and after the products.

        Args:
            x: [.., H], the tokens of this rank.
            num_rows: most rows that a rank receives; the same on every rank.
            weight_elements: elements of the weights that a row is multiplied with.
            group: the ranks that exchange.
        """
        if group_size(group) == 1 or num_rows == 0:
            return 1
        costs = self.measured(group, x)
        if costs is None:
            return self.fixed or 1
        assert group is not None
        num_rows = 1 << (num_rows - 1).bit_length()  # routes differ from step to step, and the choice is cached
        product_s = num_rows * weight_elements * (2 / costs.flops_per_s)
        # An exchange moves half the bytes of an all-reduce, whose speed was measured.
        exchange_s = num_rows * x.shape[-1] * (x.element_size() / costs.bytes_per_s) / 2
        forward = Stretch(product_s, exchange_s, exchange_s)
        backward = Stretch(2 * product_s, exchange_s, exchange_s)
        return _num_chunks(costs, (forward, backward), num_rows, 0, group, x.device)

    def prefers_layers(self, x: torch.Tensor, dim: int | None, group: Group) -> bool:
        """Whether an MLP runs faster layer by layer, with torch's fused ops, than in chunks of rows."""
        if x.numel() == 0 or not applies(x, dim):
            return False
        costs = self.measured(group, x)
        return costs is not None and costs.symmetric_memory

    def measured(self, group: Group, like: torch.Tensor) -> OverlapCosts | None:
        """Return the costs of the group for tensors like this, measured now or before.

        None if there is nothing to choose (a fixed number, one rank) or to measure (meta tensors, a fake group).
        """
        if self.fixed is not None or group is None or group_size(group) == 1 or like.is_meta:
            return None
        return overlap_costs(group, like.dtype, like.device)

    def __str__(self) -> str:
        """Return the text for extra_repr."""
        return {None: "auto", 1: "off"}.get(self.fixed, f"{self.fixed} chunks")


@functools.lru_cache(maxsize=4096)
def _num_chunks(
    costs: OverlapCosts,
    stretches: tuple[Stretch, ...],
    rows: int,
    weight_elements: int,
    group: dist.ProcessGroup,
    device: torch.device,
    fused: bool = False,
) -> int:
    """Return the choice of the cost model, cached by arguments. fused: symmetric memory may replace the chunks."""
    num_chunks = costs.num_chunks(stretches, rows, weight_elements)
    how = f"in {num_chunks} chunks"
    if num_chunks > 1 and fused:
        num_chunks, how = BY_SYMMETRIC_MEMORY, "by symmetric memory"
    first = stretches[0]
    _LOG.info(
        "overlap over %d ranks%s: %d rows %s (product %.2g ms, transfer %.2g ms)",
        group.size(),
        _nccl_share(group, device),
        rows,
        how,
        1e3 * first.product_s,
        1e3 * (first.gather_s + first.reduce_s),
    )
    return num_chunks


def _rows(x: torch.Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _nccl_share(group: dist.ProcessGroup, device: torch.device) -> str:
    """Return the text for the log line on the most SMs that NCCL takes from products, as set by init_mesh."""
    if device.type != "cuda":
        return ""
    config = getattr(getattr(group._get_backend(device), "options", None), "config", None)
    most = getattr(config, "max_ctas", 0)
    return f", at most {most} SMs for NCCL" if 0 < most < 1024 else ""  # NCCL's own default is "undefined"


_PLAIN = ChunkChoice(1)
_AUTO = ChunkChoice(None)


def chunk_choice(overlap: bool | int) -> ChunkChoice:
    """Convert a user's `overlap`: True for the cost model, False for whole products, or a number of chunks.

    Raises:
        InputError: a number below 1.
    """
    if isinstance(overlap, bool):
        return _AUTO if overlap else _PLAIN
    return ChunkChoice(overlap)


@functools.lru_cache(maxsize=64)
def overlap_costs(group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> OverlapCosts | None:
    """Measure a group once. All its ranks must call at the same point, as layers do when they are made.

    None for a fake group, which sends nothing.

    Takes a tenth of a second on a laptop; half a second in a 16-bit type without CPU units for it.

    Communication: 11 all-reduces of 4 bytes, 9 of 2 MiB (4 through shared memory), one of 40 bytes; see
        symmetric_memory.reaches.
    """
    check(
        device.type != "cuda" or not torch.cuda.is_current_stream_capturing(),
        "overlap=True measures the group at its first step, which a CUDA graph cannot capture (run a step before the "
        "capture, or pass a number of chunks)",
    )
    if dist.get_backend(group) == "fake":
        return None

    def all_reduce(x: torch.Tensor) -> None:
        start_all_reduce_(x, group).wait()

    latency_s = _seconds(all_reduce, torch.zeros(1, device=device), repeats=10)
    message = torch.zeros(1 << 19, device=device)
    message_s = _seconds(all_reduce, message, repeats=3)
    size, few, many = (4096, 512, 4096) if device.type == "cuda" else (512, 32, 256)
    weight = torch.ones(size, size, dtype=dtype, device=device)
    few_x, many_x = (torch.ones(rows, size, dtype=dtype, device=device) for rows in (few, many))
    few_s, many_s = (_seconds(lambda x: product(x, weight), x, repeats=6, enough_s=0.05) for x in (few_x, many_x))

    def beside(x: torch.Tensor) -> Transfer:
        transfer = start_all_reduce_(message, group)
        product(x, weight)
        return transfer

    # Through shared memory this thread itself does the transfer, half of it when it waits: there is nothing to measure.
    shared = is_shared(group, message)
    beside_s = math.inf if shared else _seconds(beside, many_x, repeats=4)
    # The slowest rank sets the pace, and all ranks must choose the same number.
    slowest = torch.tensor([latency_s, message_s, few_s, many_s, beside_s], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    latency_s, message_s, few_s, many_s, beside_s = slowest.tolist()
    streaming_s = max(message_s - latency_s, 1e-9)
    slowdown = 1.0 if shared else (beside_s - many_s) / min(message_s, many_s)
    # many_s = a + b many, few_s = a + b few, where a is the time to read the weight. Noise must not make it negative,
    # nor larger than half of few_s.
    weight_s = min(max(0.0, (few_s - many_s * few / many) / (1 - few / many)), 0.5 * few_s)
    return OverlapCosts(
        2 * many * size**2 / (many_s - weight_s),
        latency_s,
        message.numel() * message.element_size() / streaming_s,
        weight_s / size**2,
        min(max(0.0, slowdown), 1.0),
        reaches(group, device),
    )


def _seconds(
    work: Callable[[torch.Tensor], object], x: torch.Tensor, repeats: int, enough_s: float = math.inf
) -> float:
    """Return the shortest time of several calls, after one to warm up. A transfer that a call starts is not counted.

    enough_s: time after which the repeats end. Not for collectives, which every rank must call equally often.
    """
    best, started = math.inf, time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat > 1 and time.perf_counter() - started > enough_s:
            break
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

"""How many chunks a layer takes: a fixed number, or what the cost model says of its group, measured once.

The model is played once for every shape; later calls look the number up.
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
"""In place of a number of chunks: torch's fused op, see symmetric_memory."""


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
        """Chunks of the product with x [.., I] of all ranks, gathered along dim."""
        if group_size(group) == 1 or x.numel() == 0:
            return 1
        costs = self.measured(group, x)
        if costs is None:
            return self.fixed or 1
        ranks, rows, elements = group_size(group), _rows(x), weight.numel()
        own_s = rows * elements * (2 / costs.flops_per_s)
        # An all-gather is half of an all-reduce, whose speed was measured.
        gather_s = ranks * x.numel() * (x.element_size() / costs.bytes_per_s) / 2
        stretch = Stretch((ranks - 1) * own_s, gather_s=gather_s, before_s=own_s)
        assert group is not None
        fused = costs.symmetric_memory and applies(x, dim)
        return _num_chunks(costs, (stretch,), rows, (ranks - 1) * elements, group, x.device, fused)

    def for_mlp(self, x: torch.Tensor, ranks: int, weight_elements: int, group: Group) -> tuple[int, int]:
        """Chunks of rows that go through both products of an MLP, forward and backward; x is one of `ranks` shards.

        With shards both numbers are the same: the chunks order the rows of what forward keeps.
        """
        if group_size(group) == 1 or x.numel() == 0:
            return 1, 1
        costs = self.measured(group, x)
        if costs is None:
            return self.fixed or 1, self.fixed or 1
        assert group is not None
        rows = ranks * _rows(x)
        gathered = 0.5 if ranks > 1 else 0.0  # of what a sum over the ranks sends; a reduce-scatter is as much
        products_s = rows * weight_elements * (2 / costs.flops_per_s)
        sum_s = rows * x.shape[-1] * (x.element_size() / costs.bytes_per_s)
        forward = Stretch(products_s, (1 - gathered) * sum_s, gathered * sum_s)
        # x is gathered again, too, before the sums; where in the queue of transfers does not matter.
        backward = Stretch(products_s, sum_s, gathered * sum_s, after_s=products_s)
        if ranks > 1:
            both = _num_chunks(costs, (forward, backward), rows, weight_elements, group, x.device)
            return both, both
        return (
            _num_chunks(costs, (forward,), rows, weight_elements, group, x.device),
            _num_chunks(costs, (backward,), rows, weight_elements, group, x.device),
        )

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
    """What the model says of these stretches; looked up after the first call. fused: symmetric memory takes them."""
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
    """The most SMs that NCCL takes from the products, as init_mesh set it, for the log line."""
    if device.type != "cuda":
        return ""
    config = getattr(getattr(group._get_backend(device), "options", None), "config", None)
    most = getattr(config, "max_ctas", 0)
    return f", at most {most} SMs for NCCL" if 0 < most < 1024 else ""  # NCCL's own default is "undefined"


_PLAIN = ChunkChoice(1)
_AUTO = ChunkChoice(None)


def chunk_choice(overlap: bool | int) -> ChunkChoice:
    """What users pass as overlap: True for the cost model, False for whole products, or a number of chunks.

    Raises:
        InputError: a number below 1.
    """
    if isinstance(overlap, bool):
        return _AUTO if overlap else _PLAIN
    return ChunkChoice(overlap)


@functools.lru_cache(maxsize=64)
def overlap_costs(group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> OverlapCosts:
    """Measure a group once; all its ranks must call it at the same point, as layers do when they are made.

    A tenth of a second of messages and products on a laptop; half a second in a 16-bit type that a CPU has no units
    for.

    Communication: 11 all-reduces of 4 bytes, 9 of 2 MiB (4 through shared memory), one of 40 bytes; see
        symmetric_memory.reaches.
    """
    check(
        device.type != "cuda" or not torch.cuda.is_current_stream_capturing(),
        "overlap=True measures the group at its first step, which a CUDA graph cannot capture (run a step before the "
        "capture, or pass a number of chunks)",
    )

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

    # Through shared memory a transfer is the work of this very thread, half of it when it waits: nothing to measure.
    shared = is_shared(group, message)
    beside_s = math.inf if shared else _seconds(beside, many_x, repeats=4)
    # The slowest rank sets the pace of all; and all must choose alike.
    slowest = torch.tensor([latency_s, message_s, few_s, many_s, beside_s], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    latency_s, message_s, few_s, many_s, beside_s = slowest.tolist()
    streaming_s = max(message_s - latency_s, 1e-9)
    slowdown = 1.0 if shared else (beside_s - many_s) / min(message_s, many_s)
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


def _seconds(
    work: Callable[[torch.Tensor], object], x: torch.Tensor, repeats: int, enough_s: float = math.inf
) -> float:
    """The least time of some calls; the first warms up. A transfer that a call leaves under way is not counted.

    enough_s: time after which there are no more repeats. Not for collectives: every rank makes the same ones.
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

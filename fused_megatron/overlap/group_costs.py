"""Costs of a group of ranks, measured once: products, transfers, and what a transfer takes from a product beside it."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from fused_megatron.checks import check
from fused_megatron.collectives.transfers import Transfer, start_all_reduce_
from fused_megatron.collectives.transport.select import is_shared
from fused_megatron.ops.product import product
from fused_megatron.overlap.cost_model import OverlapCosts
from fused_megatron.overlap.symmetric_memory import reaches

# Activations of large models have tens of MiB, and only there does NCCL reach the bandwidth of its links: with messages
# of 2 MiB 8 H100 look 2.5 times slower.
_GPU_MESSAGES, _CPU_MESSAGES = (1 << 25, 1 << 26), (1 << 21,)
# Clocks for which a GPU spins before it is timed, about 2 ms: the host queues all work meanwhile.
_HEAD_START = 1 << 22


class GroupTimes(NamedTuple):
    """Measured seconds, each on the slowest rank.

    Attributes:
        latency_s: an all-reduce of 4 bytes.
        messages_s: all-reduces of message_bytes.
        few_s, many_s: products [rows, n] x [n, n] of few and many rows; few_s is 0 where copy_s is given.
        copy_s: on a GPU a copy of the largest message in memory; on a CPU 0.
        beside_s: the product of many rows beside the first message; inf if this thread itself does the transfer.
    """

    latency_s: float
    messages_s: tuple[float, ...]
    few_s: float
    many_s: float
    copy_s: float
    beside_s: float


class TimedSizes(NamedTuple):
    """Sizes of what is timed: bytes of the messages, n, rows of the two products, bytes of an element of the weight."""

    message_bytes: tuple[int, ...]
    size: int
    few: int
    many: int
    element_bytes: int


def costs_of(times: GroupTimes, sizes: TimedSizes, symmetric_memory: bool = False) -> OverlapCosts:
    """Compute the costs of a group from measured times."""
    pairs = [
        (num_bytes, max(seconds - times.latency_s, 1e-9))
        for num_bytes, seconds in zip(sizes.message_bytes, times.messages_s, strict=True)
    ]
    # Least squares of seconds = latency + bytes / bytes_per_s.
    bytes_per_s = sum(num_bytes**2 for num_bytes, _ in pairs) / sum(num_bytes * seconds for num_bytes, seconds in pairs)
    few, many = sizes.few, sizes.many
    if times.copy_s:
        # A GPU reads the weight at the speed of its memory, while it computes. The time of a product of few rows would
        # be longer, by its launch and by multiprocessors without work. A copy reads and writes.
        weight_s, product_s = sizes.element_bytes * times.copy_s / (2 * sizes.message_bytes[-1]), times.many_s
    else:
        # many_s = a + b many, few_s = a + b few, where a is the time to read the weight. Noise must not make it
        # negative, nor larger than half of few_s.
        whole_s = (times.few_s - times.many_s * few / many) / (1 - few / many)
        whole_s = min(max(0.0, whole_s), 0.5 * times.few_s)
        weight_s, product_s = whole_s / sizes.size**2, times.many_s - whole_s
    slowdown = 1.0
    if math.isfinite(times.beside_s):
        slowdown = (times.beside_s - times.many_s) / min(times.messages_s[0], times.many_s)
    return OverlapCosts(
        2 * many * sizes.size**2 / product_s,
        times.latency_s,
        bytes_per_s,
        weight_s,
        min(max(0.0, slowdown), 1.0),
        symmetric_memory,
        reads_beside=times.copy_s > 0,
    )


@functools.lru_cache(maxsize=64)
def overlap_costs(group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> OverlapCosts | None:
    """Measure a group once. All its ranks must call at the same point, as layers do when they are made.

    None for a fake group, which sends nothing.

    Takes a tenth of a second on a laptop; half a second in a 16-bit type without CPU units for it. On a GPU only the
    time of the device counts, without the host's.

    Communication: 11 all-reduces of 4 bytes; on a CPU 9 of 2 MiB (4 through shared memory), on a GPU 9 of 32 MiB and 4
        of 64 MiB; one of 48 or 56 bytes; see symmetric_memory.reaches.
    """
    refuse_capture(device)
    if dist.get_backend(group) == "fake":
        return None
    on_gpu = device.type == "cuda"

    def all_reduce(x: torch.Tensor) -> None:
        start_all_reduce_(x, group).wait()

    sizes = TimedSizes(
        _GPU_MESSAGES if on_gpu else _CPU_MESSAGES,
        *((4096, 512, 4096) if on_gpu else (512, 32, 256)),
        element_bytes=dtype.itemsize,
    )
    latency_s = seconds_of(all_reduce, torch.zeros(1, device=device), repeats=10)
    messages = [torch.zeros(num_bytes // 4, device=device) for num_bytes in sizes.message_bytes]
    messages_s = [seconds_of(all_reduce, message, repeats=3) for message in messages]
    weight = torch.ones(sizes.size, sizes.size, dtype=dtype, device=device)
    few_x, many_x = (torch.ones(rows, sizes.size, dtype=dtype, device=device) for rows in (sizes.few, sizes.many))

    def multiply(x: torch.Tensor) -> None:
        product(x, weight)

    many_s = seconds_of(multiply, many_x, repeats=6, enough_s=0.05)
    few_s = 0.0 if on_gpu else seconds_of(multiply, few_x, repeats=6, enough_s=0.05)
    copy_s = seconds_of(messages[-1].copy_, torch.zeros_like(messages[-1]), repeats=6) if on_gpu else 0.0

    def beside(x: torch.Tensor) -> Transfer:
        transfer = start_all_reduce_(messages[0], group)
        product(x, weight)
        return transfer

    # Through shared memory this thread itself does the transfer, half of it when it waits: there is nothing to measure.
    shared = is_shared(group, messages[0])
    beside_s = math.inf if shared else seconds_of(beside, many_x, repeats=4)
    # The slowest rank sets the pace, and all ranks must choose the same number.
    latency_s, few_s, many_s, copy_s, beside_s, *messages_s = slowest(
        [latency_s, few_s, many_s, copy_s, beside_s, *messages_s], group, device
    )
    times = GroupTimes(latency_s, tuple(messages_s), few_s, many_s, copy_s, beside_s)
    return costs_of(times, sizes, reaches(group, device))


def refuse_capture(device: torch.device) -> None:
    """Raise InputError if a CUDA graph is being captured, which cannot measure."""
    check(
        device.type != "cuda" or not torch.cuda.is_current_stream_capturing(),
        "overlap=True measures the group at its first step, which a CUDA graph cannot capture (run a step before the "
        "capture, or pass a number of chunks)",
    )


def slowest(seconds: Sequence[float], group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """Return each number on the rank where it is largest; all ranks call at once and get the same.

    Communication: one all-reduce of 8 bytes a number.
    """
    found = torch.tensor(list(seconds), dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    most: list[float] = found.tolist()
    return most


def seconds_of(
    work: Callable[[torch.Tensor], object], x: torch.Tensor, repeats: int, enough_s: float = math.inf
) -> float:
    """Return the shortest time of several calls, after one to warm up. A transfer that a call starts is not counted.

    On a GPU the device is timed, by events.

    Args:
        work: called with x.
        x: on the device that is timed.
        repeats: number of calls that are timed.
        enough_s: time after which the repeats end, on a CPU. Not for collectives, which every rank must call equally
            often.
    """
    if x.is_cuda:
        return _device_seconds(work, x, repeats)
    best, started = math.inf, time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat > 1 and time.perf_counter() - started > enough_s:
            break
        begin = time.perf_counter()
        left = work(x)
        best = min(best, time.perf_counter() - begin)
        if isinstance(left, Transfer):
            left.wait()
    return best


def _device_seconds(work: Callable[[torch.Tensor], object], x: torch.Tensor, repeats: int) -> float:
    """Return seconds_of on a GPU: it spins while the host queues all calls, so that it never waits for the host."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for call in range(repeats + 1):
        if call == 1:
            torch.cuda.synchronize()  # the first call may load kernels, and connect ranks
            torch.cuda._sleep(_HEAD_START)
        begin, end = events[max(0, call - 1)]
        begin.record()
        left = work(x)
        end.record()
        if isinstance(left, Transfer):
            left.wait()
    torch.cuda.synchronize()
    return min(begin.elapsed_time(end) for begin, end in events) / 1e3

"""Measurements of a machine: matrix products, memory bandwidth, launch cost, collectives and messages by size.

All ranks measure at the same time, as they compute in a training step: cores, caches and memory are shared. Collectives
go through the transports of the layers (collectives/transport), messages through the channels of the pipeline. A figure
is a median. On a CPU it leaves out the time in which another process held the core, so that a busy machine gives nearly
the figures of an idle one.
"""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from fused_megatron import ops
from fused_megatron.collectives.groups import Group, group_size
from fused_megatron.collectives.together import gather_json
from fused_megatron.collectives.transfers import start_all_gather, start_all_reduce_, start_reduce_scatter
from fused_megatron.observe.core_time import CoreTime, quiet_median_s
from fused_megatron.ops.product import product
from fused_megatron.overlap import overlap_costs
from fused_megatron.pipeline.run.channels import Channel, Channels

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")
_DIRECTION = "F"
_LEAST_ROUND_S, _MOST_CALLS = 0.005, 20
"""Time of calls in a row, and their most: ranks leave the barrier before them up to a millisecond apart."""


@dataclass(frozen=True)
class Sizes:
    """Sizes to measure.

    Attributes:
        products: (rows, outputs, inputs) of linear layers.
        memory_bytes: bytes of the tensors that memory-bound ops read.
        transfer_bytes: bytes of the whole tensor of a collective, and of a message.
        enough_s: seconds after which a measurement has repeats enough.
        repeats: most repeats of a measurement; there are at least 3.
    """

    products: tuple[tuple[int, int, int], ...]
    memory_bytes: tuple[int, ...]
    transfer_bytes: tuple[int, ...]
    enough_s: float = 0.4
    repeats: int = 15


CPU_SIZES = Sizes(
    products=(
        (128, 128, 128),
        (256, 256, 256),
        (256, 1024, 256),
        (1024, 256, 256),
        (1024, 768, 256),
        (1024, 1024, 256),
        (512, 512, 512),
        (1024, 2048, 512),
        (512, 8192, 256),
    ),
    memory_bytes=(1 << 16, 1 << 20, 1 << 23, 1 << 25),
    transfer_bytes=(64, 1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24),
)
GPU_SIZES = Sizes(
    products=(
        (1024, 1024, 1024),
        (2048, 1024, 1024),
        (2048, 4096, 1024),
        (4096, 2048, 2048),
        (4096, 8192, 2048),
        (4096, 4096, 4096),
        (8192, 4096, 4096),
        (8192, 8192, 8192),
    ),
    memory_bytes=(1 << 20, 1 << 24, 1 << 27, 1 << 30),
    transfer_bytes=(64, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28),
)


@dataclass(frozen=True)
class Measurements:
    """Measured times on the slowest rank, in seconds.

    Attributes:
        products: by (rows, outputs, inputs), the three products of a linear layer together.
        memory: by bytes of x, adding two tensors of these bytes into a third: it moves 3 times as many bytes.
        launch_s: a small op of ours, forward only.
        collectives: by (kind, bytes of the whole tensor).
        messages: by bytes, from a send on one rank to the end of the receive on another.
        cores: cores that this process may use, or GPUs.
        ranks: ranks that measured at the same time.
        threads: threads of each rank; 1 on a GPU.
        busy_share: share of the time in which another process held the core.
        transfer_overlap: share of a transfer that a product beside it hides, as layers measure it that choose their
            chunks (overlap_costs).
    """

    products: dict[tuple[int, int, int], float]
    memory: dict[int, float]
    launch_s: float
    collectives: dict[tuple[str, int], float] = field(default_factory=dict)
    messages: dict[int, float] = field(default_factory=dict)
    cores: int = 1
    ranks: int = 1
    threads: int = 1
    busy_share: float = 0.0
    transfer_overlap: float = 0.0


def usable_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_ranks(group: Group) -> int:
    """Return the cores that the ranks of a group may use, all together; ranks that are pinned share none.

    Communication: one gather of JSON.
    """
    own = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return len({(node, core) for node, cores in gather_json((platform.node(), own), group) for core in cores})


def threads_of_rank(ranks: int) -> int:
    """Return the threads of each of `ranks` ranks of this machine, as `fused-megatron launch` sets them."""
    return max(1, usable_cores() // ranks)


def measure_machine(device: torch.device, dtype: torch.dtype, group: Group, sizes: Sizes) -> Measurements:
    """Measure on all ranks of a group together; every rank gets the same figures.

    Args:
        device: of this rank.
        dtype: of products and collectives.
        group: ranks between which transfers are measured; None for one rank.
        sizes: see Sizes.

    Communication: the collectives and messages that it measures, and a few gathers of JSON.
    Memory: twice the largest size.
    """
    clock = CoreTime()
    products = {shape: _linear_s(device, dtype, shape, sizes, group) for shape in sizes.products}
    memory = {size: _memory_s(device, size, sizes, group) for size in sizes.memory_bytes}
    launch_s = _launch_s(device, sizes, group)
    collectives = {}
    messages = {}
    overlap = 0.0
    if group is not None and group_size(group) > 1:
        for kind in COLLECTIVES:
            for size in sizes.transfer_bytes:
                collectives[kind, size] = _collective_s(kind, size, device, dtype, sizes, group)
        messages = _messages_s(device, sizes, group)
        costs = overlap_costs(group, dtype, device)
        overlap = 0.0 if costs is None else 1 - costs.slowdown
    wall_s, wait_s = clock.stop()
    shares = gather_json(wait_s / wall_s, group)
    return Measurements(
        products,
        memory,
        launch_s,
        collectives,
        messages,
        cores=torch.cuda.device_count() if device.type == "cuda" else usable_cores(),
        ranks=group_size(group),
        threads=1 if device.type == "cuda" else torch.get_num_threads(),
        busy_share=sum(shares) / len(shares),
        transfer_overlap=overlap,
    )


def _linear_s(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], sizes: Sizes, group: Group
) -> float:
    """Time the three products of a linear layer."""
    rows, outputs, inputs = shape
    x, weight = (torch.randn(*size, device=device).to(dtype) for size in ((rows, inputs), (outputs, inputs)))
    dy = torch.randn(rows, outputs, device=device).to(dtype)
    gradient = torch.zeros(outputs, inputs, dtype=dtype, device=device)

    def step() -> None:
        product(x, weight)
        product(dy, weight.t())
        product(dy.t(), x.t(), out=gradient, add=True)

    return _own_seconds(step, device, sizes, group)


def _memory_s(device: torch.device, num_bytes: int, sizes: Sizes, group: Group) -> float:
    x, y, z = (torch.zeros(num_bytes // 4, device=device) for _ in range(3))
    return _own_seconds(lambda: torch.add(x, y, out=z), device, sizes, group)


def _launch_s(device: torch.device, sizes: Sizes, group: Group) -> float:
    """Time an op of ours on a tensor of 1 KiB: on a GPU, from launch to launch."""
    x, bias = torch.zeros(16, 16, device=device), torch.zeros(16, device=device)
    number = 100

    def step() -> None:
        for _ in range(number):
            ops.bias_gelu(x, bias)

    return _own_seconds(step, device, sizes, group) / number


def _own_seconds(step: Callable[[], object], device: torch.device, sizes: Sizes, group: Group) -> float:
    """Return the median time of a call without communication, on the slowest rank, while all ranks do the same."""
    step()
    _wait(device)
    if group is not None:
        dist.barrier(group)
    found: list[tuple[float, float]] = []
    started = time.perf_counter()
    while len(found) < 3 or (len(found) < sizes.repeats and time.perf_counter() - started < sizes.enough_s):
        clock = CoreTime()
        step()
        _wait(device)
        found.append(clock.stop())
    return max(gather_json(quiet_median_s(found), group))


def _collective_s(
    kind: str, num_bytes: int, device: torch.device, dtype: torch.dtype, sizes: Sizes, group: dist.ProcessGroup
) -> float:
    ranks = group_size(group)
    elements = max(ranks, num_bytes // dtype.itemsize // ranks * ranks)
    whole = torch.zeros(elements, dtype=dtype, device=device)
    shard = whole[: elements // ranks].clone()
    starts: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: start_all_reduce_(whole, group).wait(),
        "all_gather": lambda: start_all_gather(shard, 0, group).wait(),
        "reduce_scatter": lambda: start_reduce_scatter(whole, 0, group).wait(),
    }
    return _shared_s(starts[kind], device, sizes, group)


def _messages_s(device: torch.device, sizes: Sizes, group: dist.ProcessGroup) -> dict[int, float]:
    """Time messages between the first two ranks: half of the time there and back."""
    rank = group.rank()
    timeout = datetime.timedelta(seconds=120)
    there, back = Channel(0, 1, _DIRECTION), Channel(1, 0, _DIRECTION)
    store = dist.PrefixStore("calibration", group.get_group_store())
    channels = Channels([there, back], rank, store, device, timeout)
    found = {}
    for size in sizes.transfer_bytes:
        buffer = torch.zeros(size, dtype=torch.uint8, device=device)

        def step(buffer: torch.Tensor = buffer) -> None:
            if rank == 0:
                channels.send(buffer, 1, _DIRECTION, 0).wait()
                channels.receive(buffer, 1, _DIRECTION, 0).wait()
            elif rank == 1:
                channels.receive(buffer, 0, _DIRECTION, 0).wait()
                channels.send(buffer, 0, _DIRECTION, 0).wait()

        found[size] = _shared_s(step, device, sizes, group, pair_only=True) / 2
    channels.close()
    return found


def _shared_s(
    step: Callable[[], object],
    device: torch.device,
    sizes: Sizes,
    group: dist.ProcessGroup,
    *,
    pair_only: bool = False,
) -> float:
    """Return the median time of a call with communication; every rank repeats it equally often.

    pair_only: the other ranks do nothing, and leave their cores to the first two.
    """
    step()
    longest_s = max(seconds for seconds, *_ in gather_json(_round(step, device, group), group))
    calls = max(1, min(_MOST_CALLS, int(_LEAST_ROUND_S / longest_s)))
    rounds = max(3, min(sizes.repeats, int(sizes.enough_s / (calls * longest_s))))
    measured = [_round(step, device, group, calls) for _ in range(rounds)]
    return _median_of_slowest(measured, group, takes_turns=not pair_only and group_size(group) > cores_of_ranks(group))


def _round(
    step: Callable[[], object], device: torch.device, group: dist.ProcessGroup, calls: int = 1
) -> tuple[float, float, float]:
    """Return the time of a call, its wait for a core and its time of the core, each the mean of some calls in a row."""
    dist.barrier(group)
    own_s, clock = time.thread_time(), CoreTime()
    for _ in range(calls):
        step()
    _wait(device)
    wall_s, wait_s = clock.stop()
    return wall_s / calls, wait_s / calls, (time.thread_time() - own_s) / calls


def _median_of_slowest(
    rounds: Sequence[tuple[float, float, float]], group: dist.ProcessGroup, *, takes_turns: bool
) -> float:
    """Return the median, over rounds, of the slowest rank's time without the longest wait for a core.

    If ranks take turns on the cores, the work of others fills the waits of a rank. Then the mean of the ranks' times of
    the core counts.
    """
    by_round = list(zip(*gather_json([list(each) for each in rounds], group), strict=True))
    if takes_turns:
        return statistics.median(statistics.mean(own_s for _, _, own_s in ranks) for ranks in by_round)
    slowest = [(max(wall for wall, *_ in ranks), max(wait for _, wait, _ in ranks)) for ranks in by_round]
    return quiet_median_s([(wall_s, min(wait_s, 0.9 * wall_s)) for wall_s, wait_s in slowest])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""What a benchmark needs of a device: a clock, a way to start each round alike, its speed limit, its peak memory."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from fused_megatron.checks import dtype_name

T = TypeVar("T")

_CEILING_BYTES = 1 << 30
_CEILING_ROUNDS = 10
_CPU_GEMM_SIZE, _GPU_GEMM_SIZE = 2048, 8192
_MIN_FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU of today


if importlib.util.find_spec("resource"):  # not on every platform
    import resource

    def page_faults() -> int:
        """Pages that the system has given to this process so far."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

else:

    def page_faults() -> int:
        """Not known here: 0."""
        return 0


class TimingDevice(Protocol):
    """A device that functions are timed on."""

    name: str
    device: torch.device
    is_gpu: bool

    def seconds(self, function: Callable[[], object]) -> float:
        """Of one call, all its work done; what it returns is freed within."""

    def seconds_of_two(self, first: Callable[[], T], second: Callable[[T], object]) -> tuple[float, float]:
        """Of two calls in a row, the second of what the first returns; nothing else comes between."""

    def peak_bytes(self, function: Callable[[], object]) -> int | None:
        """The most memory that one call holds at a time beyond what was held before; None if it cannot be told."""


class CpuDevice:
    """The CPU, by the wall clock."""

    is_gpu = False

    def __init__(self, name: str = "cpu") -> None:
        self.name = name
        self.device = torch.device("cpu")

    def seconds(self, function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def seconds_of_two(self, first: Callable[[], T], second: Callable[[T], object]) -> tuple[float, float]:
        start = time.perf_counter()
        held = [first()]
        between = time.perf_counter()
        second(held.pop())
        return between - start, time.perf_counter() - between

    def peak_bytes(self, function: Callable[[], object]) -> int | None:
        """Of what torch's allocator gives out; a library's own scratch memory is not seen."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
        try:
            events = profiler.profiler.kineto_results.events()
        except AttributeError:  # no public name for it: another torch may have moved it
            return None
        held = peak = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak


class CudaDevice:
    """A GPU, by its own events; its L2 cache is overwritten before every measured call."""

    is_gpu = True

    def __init__(self, index: int = 0) -> None:
        properties = torch.cuda.get_device_properties(index)
        self.name = properties.name
        self.device = torch.device("cuda", index)
        size = max(_MIN_FLUSH_BYTES, 2 * properties.L2_cache_size)
        self._flush = torch.empty(size // 4, dtype=torch.int32, device=self.device)

    def seconds(self, function: Callable[[], object]) -> float:
        return self.seconds_of_two(function, lambda _: None)[0]

    def seconds_of_two(self, first: Callable[[], T], second: Callable[[T], object]) -> tuple[float, float]:
        begin, between, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        # The flush also keeps the GPU busy while the CPU queues the call, so that launches are not what is timed.
        self._flush.zero_()
        begin.record()
        held = [first()]
        between.record()
        second(held.pop())
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(between) / 1e3, between.elapsed_time(end) / 1e3

    def peak_bytes(self, function: Callable[[], object]) -> int | None:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


class FakeGpu(CpuDevice):
    """The path of a GPU, computed and timed on the CPU: for tests of the harness where there is none."""

    is_gpu = True

    def __init__(self, name: str) -> None:
        super().__init__(f"fake {name}")

    def seconds(self, function: Callable[[], object]) -> float:
        torch.zeros(1 << 16)  # the flush
        return super().seconds(function)

    def seconds_of_two(self, first: Callable[[], T], second: Callable[[T], object]) -> tuple[float, float]:
        torch.zeros(1 << 16)
        return super().seconds_of_two(first, second)


def find_gpus(fake: Sequence[str] = ()) -> list[TimingDevice]:
    """The GPUs of this machine, or one FakeGpu a name."""
    if fake:
        return [FakeGpu(name) for name in fake]
    return [CudaDevice(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def copy_step(num_bytes: int, device: torch.device) -> Callable[[], Any]:
    """A copy between two buffers that exist, which moves num_bytes in all: half of them read, half written."""
    source = torch.zeros(max(1, num_bytes // 8), dtype=torch.float32, device=device)
    copy = torch.zeros_like(source)
    return lambda: copy.copy_(source)


def copy_ceiling_gb_per_s(device: TimingDevice, num_bytes: int = _CEILING_BYTES) -> float:
    """The bytes a second that a large copy moves, reads and writes counted: the 100 % of a memory-bound kernel."""
    return num_bytes / _median_seconds(device, copy_step(num_bytes, device.device)) / 1e9


def gemm_ceiling_gflop_per_s(device: TimingDevice, dtype: torch.dtype, size: int | None = None) -> float:
    """The GFLOP/s of a large square product: the 100 % of a compute-bound kernel."""
    size = size or (_GPU_GEMM_SIZE if device.device.type == "cuda" else _CPU_GEMM_SIZE)
    a, b = (torch.randn(size, size, device=device.device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * size**3 / _median_seconds(device, lambda: torch.mm(a, b, out=product)) / 1e9


def measure_ceilings(
    device: TimingDevice, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16), *, quick: bool = False
) -> dict[str, float]:
    """What this device does at most with the threads that torch has now, by the names of a results file.

    About three seconds on two cores. On several ranks that share a machine: call it on all of them at the same time.
    quick: tiny, for tests.
    """
    ceilings = {"copy_gb_per_s": copy_ceiling_gb_per_s(device, 1 << 20 if quick else _CEILING_BYTES)}
    for dtype in dtypes:
        name = f"gemm_gflop_per_s {dtype_name(dtype)}"
        ceilings[name] = gemm_ceiling_gflop_per_s(device, dtype, 64 if quick else None)
    return ceilings


def _median_seconds(device: TimingDevice, step: Callable[[], object]) -> float:
    step()  # faults its pages in, chooses its kernel
    return statistics.median(device.seconds(step) for _ in range(_CEILING_ROUNDS))

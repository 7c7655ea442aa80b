"""Devices that benchmarks run on: their clocks, peak memory, and measured speed limits."""

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
_MIN_FLUSH_BYTES = 256 << 20  # more than the L2 cache of any current GPU


if importlib.util.find_spec("resource"):  # not on every platform
    import resource

    def page_faults() -> int:
        """Return the number of page faults of this process so far."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

else:

    def page_faults() -> int:
        """Return 0: this platform does not count page faults."""
        return 0


class TimingDevice(Protocol):
    """Device on which functions are timed."""

    name: str
    device: torch.device
    is_gpu: bool

    def seconds(self, function: Callable[[], object]) -> float:
        """Time one call until all its work is done; freeing its result is included."""

    def seconds_of_two(self, first: Callable[[], T], second: Callable[[T], object]) -> tuple[float, float]:
        """Time two calls in a row; the second takes the result of the first."""

    def peak_bytes(self, function: Callable[[], object]) -> int | None:
        """Return the largest memory that one call holds beyond the memory held before; None if unknown."""


class CpuDevice:
    """The CPU, timed by the wall clock."""

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
        """Return the peak of memory from torch's allocator; scratch memory of libraries is not counted."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
        try:
            events = profiler.profiler.kineto_results.events()
        except AttributeError:  # a private name that another release of torch may move
            return None
        held = peak = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak


class CudaDevice:
    """A GPU, timed by its own events; its L2 cache is overwritten before every measured call."""

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
        # The flush also keeps the GPU busy while the CPU queues the call, so that launch times are not measured.
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
    """Stand-in for a GPU that computes and times on the CPU, for tests of the benchmarks without a GPU."""

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
    """Return the GPUs of this machine, or a FakeGpu for each name."""
    if fake:
        return [FakeGpu(name) for name in fake]
    return [CudaDevice(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def copy_step(num_bytes: int, device: torch.device) -> Callable[[], Any]:
    """Return a function that copies between two existing buffers: it reads num_bytes / 2 and writes num_bytes / 2."""
    source = torch.zeros(max(1, num_bytes // 8), dtype=torch.float32, device=device)
    copy = torch.zeros_like(source)
    return lambda: copy.copy_(source)


def copy_ceiling_gb_per_s(device: TimingDevice, num_bytes: int = _CEILING_BYTES) -> float:
    """Measure the GB/s of a large copy, counting reads and writes: the speed limit of a memory-bound kernel."""
    return num_bytes / _median_seconds(device, copy_step(num_bytes, device.device)) / 1e9


def gemm_ceiling_gflop_per_s(device: TimingDevice, dtype: torch.dtype, size: int | None = None) -> float:
    """Measure the GFLOP/s of a large square matrix product: the speed limit of a compute-bound kernel."""
    size = size or (_GPU_GEMM_SIZE if device.device.type == "cuda" else _CPU_GEMM_SIZE)
    a, b = (torch.randn(size, size, device=device.device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * size**3 / _median_seconds(device, lambda: torch.mm(a, b, out=product)) / 1e9


def measure_ceilings(
    device: TimingDevice, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16), *, quick: bool = False
) -> dict[str, float]:
    """Measure the speed limits of this device with torch's current number of threads, by their names in a results file.

    Takes about three seconds on two cores. If several ranks share a machine, all must call it at the same time.

    Args:
        device: to measure.
        dtypes: of the matrix products.
        quick: use tiny sizes, for tests.
    """
    ceilings = {"copy_gb_per_s": copy_ceiling_gb_per_s(device, 1 << 20 if quick else _CEILING_BYTES)}
    for dtype in dtypes:
        name = f"gemm_gflop_per_s {dtype_name(dtype)}"
        ceilings[name] = gemm_ceiling_gflop_per_s(device, dtype, 64 if quick else None)
    return ceilings


def _median_seconds(device: TimingDevice, step: Callable[[], object]) -> float:
    step()  # warm-up: page faults, choice of a kernel
    return statistics.median(device.seconds(step) for _ in range(_CEILING_ROUNDS))

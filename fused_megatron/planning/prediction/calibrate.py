"""Calibration of this machine: measurements on its ranks, and the constants that describe them best."""

import dataclasses
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from fused_megatron.config import TrainConfig
from fused_megatron.observe.free_memory import memory_bytes
from fused_megatron.planning.prediction.calibration import Observation, fit
from fused_megatron.planning.prediction.cluster import Cluster, Fitted
from fused_megatron.planning.prediction.engine import OWN
from fused_megatron.planning.prediction.fitted_runs import values_of
from fused_megatron.planning.prediction.machine_measurements import (
    Measurements,
    Sizes,
    measure_machine,
    usable_cores,
)
from fused_megatron.planning.prediction.measured_steps import (
    StepTimes,
    median_probe_s,
    start_rank,
    steps_on_rank,
)
from fused_megatron.planning.prediction.product_time import linear_s
from fused_megatron.planning.prediction.shared_cores import with_threads
from fused_megatron.planning.prediction.step_time import predict_step
from fused_megatron.planning.prediction.transfer_time import Ring

PRODUCTS, MEMORY, COLLECTIVES, MESSAGES, STEPS = "products", "memory", "collectives", "messages", "steps"
_WEIGHTS = {PRODUCTS: 0.05, MEMORY: 0.1, COLLECTIVES: 0.1, MESSAGES: 0.1, STEPS: 1.0}
ALONE = ("product_efficiency", "product_us", "attention_efficiency", "memory_gb_per_s", "launch_us", "step_ms")
"""Constants that one rank shows."""
IN_NODE = ("node_gb_per_s", "node_latency_us")
"""Constants that several ranks show."""
NETWORK = ("network_gb_per_s", "network_latency_us")
"""Constants of the network: on a CPU, of messages between two ranks."""
_LEAST_OVERLAP = 0.05
"""Overlap below which the thread that computes also copies: nothing to fit."""
LEAST_ERROR_PERCENT = 10.0
"""Error bar of a calibration whose constants describe its own steps better than this."""
UNMEASURED_GB_PER_S, UNMEASURED_US = 25.0, 30.0
"""Constants of a network between nodes of GPUs, which one node cannot measure."""


@dataclass(frozen=True)
class Plan:
    """Work of a calibration.

    Attributes:
        device: "cpu" or "cuda".
        sizes: of the measurements.
        configs: whose steps are measured, by name.
        rounds: measured steps of each config.
    """

    device: str
    sizes: Sizes
    configs: Mapping[str, TrainConfig]
    rounds: int = 5

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the products: the dtype of training."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


@dataclass(frozen=True)
class Found:
    """Result of the measurements, the same on every rank."""

    measurements: Measurements
    steps: Mapping[str, StepTimes]

    @property
    def probe_s(self) -> float | None:
        """Seconds of CoreSpeed's work at the speed of cores that the constants describe."""
        return median_probe_s(self.steps.values())


Run = Callable[..., Any]
"""run(fn, *args) calls fn(rank, world_size, *args) on new ranks, and returns the result of rank 0."""


def measure(plan: Plan, run: Run) -> Found:
    """Measure the machine, and then the steps of each config, each on new ranks.

    Process groups stay with their process, and the threads of each take some of its time.
    """
    return Found(
        run(measure_on_rank, plan.device, plan.dtype, plan.sizes),
        {name: run(steps_on_rank, plan.device, config, plan.rounds) for name, config in plan.configs.items()},
    )


def measure_on_rank(rank: int, world_size: int, device_type: str, dtype: torch.dtype, sizes: Sizes) -> Measurements:
    """Measure on all ranks of the default process group; every rank calls this."""
    device = start_rank(rank, world_size, device_type)
    return measure_machine(device, dtype, dist.group.WORLD if world_size > 1 else None, sizes)


def calibrate(found: Found, plan: Plan, name: str) -> tuple[Cluster, list[Observation]]:
    """Return the cluster whose constants describe the measurements best, and the observations of the fit.

    Args:
        found: the measurements.
        plan: that they followed.
        name: of the cluster.
    """
    start = first_guess(found.measurements, plan.device, name)
    observations = observations_of(found, plan)
    several = found.measurements.ranks > 1
    names = (*ALONE, *(IN_NODE if several else ()), *(NETWORK if several and plan.device == "cpu" else ()))
    if start.transfer_overlap > _LEAST_OVERLAP:
        names = (*names, "transfer_overlap")
    cluster = fit(start, observations, names)
    return dataclasses.replace(cluster, fitted=_fitted(cluster, observations, plan)), observations


def _fitted(cluster: Cluster, observations: Sequence[Observation], plan: Plan) -> Fitted | None:
    """Return the ranges of the steps of a calibration, and an error bar from their errors; None without steps."""
    errors = [abs(o.error(cluster)) for o in observations if o.kind == STEPS]
    if not errors:
        return None
    sizes = [values_of(config) for config in plan.configs.values()]
    ranges: dict[str, tuple[float, float]] = {
        name: (min(each[name] for each in sizes), max(each[name] for each in sizes)) for name in sizes[0]
    }
    ranges["gpus"] = (1, ranges["gpus"][1])
    return Fitted(max(LEAST_ERROR_PERCENT, 100 * max(errors)), (OWN,), (), ranges)


def first_guess(measured: Measurements, device: str, name: str) -> Cluster:
    """Return a cluster with the constants that single measurements show."""
    rates = [6 * m * n * k / seconds for (m, n, k), seconds in measured.products.items()]
    peak = 1.25 * max(rates) / measured.threads
    total, _ = memory_bytes()
    memory_gb = total / 1e9 / usable_cores()
    if device == "cuda":
        memory_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    streamed = max(measured.memory)
    # All-reduces of the smallest and of the largest size; messages there and back.
    node = _line({size: s for (kind, size), s in measured.collectives.items() if kind == "all_reduce"})
    message = _line(measured.messages)
    ranks = measured.ranks
    copies = device == "cpu" and not measured.transfer_overlap
    share = 3 * ranks - 1 if copies else 2 * (ranks - 1) / ranks or 1.0
    return Cluster(
        name=name,
        device=device,
        gpus_per_node=measured.cores,
        memory_gb=memory_gb,
        peak_tflops=peak / 1e12,
        product_efficiency=statistics.median(rates) / measured.threads / peak,
        product_us=1e6 * measured.launch_s / 4,
        attention_efficiency=0.3,
        memory_gb_per_s=3 * streamed / measured.memory[streamed] / measured.threads / 1e9,
        launch_us=1e6 * measured.launch_s,
        node_gb_per_s=share * node[1] / 1e9,
        node_latency_us=1e6 * node[0] / max(1, ranks - 1),
        network_gb_per_s=UNMEASURED_GB_PER_S if device == "cuda" else message[1] / 1e9,
        network_latency_us=UNMEASURED_US if device == "cuda" else 1e6 * message[0],
        step_ms=1.0,
        transfer_overlap=measured.transfer_overlap,
    )


def _line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Return (seconds of the smallest size, bytes a second of the largest); guesses if nothing was measured."""
    if not seconds:
        return 1e-4, 3e9
    least, most = min(seconds), max(seconds)
    return seconds[least], most / max(1e-9, seconds[most] - seconds[least])


def observations_of(found: Found, plan: Plan) -> list[Observation]:
    """Return all measurements with their predictions."""
    measured = found.measurements
    size = plan.dtype.itemsize
    observed = []
    for shape, seconds in measured.products.items():
        label = " x ".join(map(str, shape))
        observed.append(_observation(PRODUCTS, label, seconds, partial(_linear_s, size, measured.threads, shape)))
    # Smaller tensors stay in caches.
    largest = max(measured.memory)
    predicted = partial(_memory_s, 3 * largest, measured.threads)
    observed.append(_observation(MEMORY, f"{largest} bytes", measured.memory[largest], predicted))
    for (kind, num_bytes), seconds in measured.collectives.items():
        predicted = partial(_collective_s, measured.ranks, kind, num_bytes)
        observed.append(_observation(COLLECTIVES, f"{kind} of {num_bytes} bytes", seconds, predicted))
    for num_bytes, seconds in measured.messages.items():
        predicted = partial(_message_s, measured.ranks, num_bytes)
        observed.append(_observation(MESSAGES, f"{num_bytes} bytes", seconds, predicted))
    for name, times in found.steps.items():
        seconds = times.median_s(without_waits=True, probe_s=found.probe_s)
        observed.append(_observation(STEPS, name, seconds, partial(_step_s, plan.configs[name])))
    return observed


def _observation(kind: str, label: str, seconds: float, predicted: Callable[[Cluster], float]) -> Observation:
    return Observation(kind, label, seconds, predicted, _WEIGHTS[kind])


def _linear_s(size: int, threads: int, shape: tuple[int, int, int], cluster: Cluster) -> float:
    """Predict the three products of a linear layer."""
    return sum(linear_s(with_threads(cluster, threads), size, 1, *shape))


def _memory_s(num_bytes: int, threads: int, cluster: Cluster) -> float:
    return num_bytes / (1e9 * with_threads(cluster, threads).memory_gb_per_s)


def _collective_s(ranks: int, kind: str, num_bytes: int, cluster: Cluster) -> float:
    ring = Ring(cluster, ranks)
    return ring.all_reduce_s(num_bytes) if kind == "all_reduce" else ring.gather_s(num_bytes)


def _message_s(ranks: int, num_bytes: int, cluster: Cluster) -> float:
    return Ring(cluster, ranks).message_s(num_bytes)


def _step_s(config: TrainConfig, cluster: Cluster) -> float:
    return predict_step(config, cluster).seconds


def machine_name(processor: str, device: str, number: int) -> str:
    """Return a name for a cluster of this machine: "amd-epyc-2-cores", "nvidia-h200-8-gpus"."""
    words = re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-") or device
    return f"{words[:40]}-{number}-{'cores' if device == 'cpu' else 'gpus'}"

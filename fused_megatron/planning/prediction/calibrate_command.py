"""The command `fused-megatron calibrate`: measures this machine, and writes its constants as a cluster file."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fused_megatron.checks import InputError, check, check_positive
from fused_megatron.durable import check_can_write, replace_file
from fused_megatron.observe.processor import processor_name
from fused_megatron.planning.prediction.calibrate import STEPS, Found, Plan, calibrate, machine_name, measure
from fused_megatron.planning.prediction.calibration import Observation, error_table
from fused_megatron.planning.prediction.calibration_steps import calibration_configs
from fused_megatron.planning.prediction.cluster import Cluster, cluster_text, load_cluster
from fused_megatron.planning.prediction.engine import engine_of
from fused_megatron.planning.prediction.machine_measurements import CPU_SIZES, GPU_SIZES, Measurements, usable_cores
from fused_megatron.planning.prediction.measured_blocks import learned_lines, read_steps, with_measured_blocks
from fused_megatron.planning.verify.config_check import check_starts_own_ranks
from fused_megatron.testing.run_on_ranks import run_on_ranks

_BUSY = 0.1
"""Share of the time that other processes may hold the cores before the report warns."""
_LIMIT_S = 900.0


@dataclass(frozen=True)
class CalibrateArguments:
    """Measure this machine in about a minute (products, memory, launches, collectives, messages, small training steps),
    and write its constants as a cluster file for predict, plan and training.cluster. With --steps: measure nothing, and
    learn from measured training steps how much longer blocks of their shapes take on a known cluster."""

    ranks: int | None = None
    """Ranks that measure together, all on this machine. None: one for each GPU, or for each core (at least 2). With
    --steps, the ranks of the run; None: as many as its config needs."""
    output: Path = Path("cluster.toml")
    """The file to write."""
    device: Literal["cpu", "cuda"] | None = None
    """Device of the ranks. None: cuda where there is a GPU."""
    steps: Path | None = None
    """Measured steps: a run's folder, or a CSV file as of predict --validate. None: measure this machine."""
    cluster: str | None = None
    """With --steps: the cluster that ran the steps: a shipped name, or a file, whose measured blocks stay."""
    engine: str | None = None
    """With --steps: the program that ran the steps. None: this package for a folder, the source's for a file."""


def run_calibrate(arguments: CalibrateArguments, plan: Plan | None = None) -> int:
    """Measure, print what was found, write the file, and return 0.

    Args:
        arguments: of the command line.
        plan: the work of the calibration; None: what the device and the ranks ask for.

    Raises:
        InputError: ranks that a launcher started, no GPU, a file that cannot be written; with --steps, no cluster, or
            steps that cannot be read or are not of this cluster.
    """
    if arguments.steps is not None:
        _learn(arguments, arguments.steps)
        return 0
    check(
        arguments.cluster is None and arguments.engine is None,
        "cluster and engine go with --steps: without it, calibrate measures this machine",
    )
    check_starts_own_ranks("calibrate")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    check(device == "cpu" or gpus > 0, "device='cuda' needs a GPU (--device cpu measures the processor)")
    ranks = arguments.ranks if arguments.ranks is not None else max(2, usable_cores()) if device == "cpu" else gpus
    check_positive("ranks", ranks)
    check(device == "cpu" or ranks <= gpus, f"ranks={ranks} must be at most the {gpus} GPU(s) of this machine")
    check_can_write("output", arguments.output)
    if plan is None:
        plan = Plan(device, CPU_SIZES if device == "cpu" else GPU_SIZES, calibration_configs(device, ranks))
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    begin = time.perf_counter()

    def run(function: Callable[..., Any], *words: Any) -> Any:
        return run_on_ranks(function, ranks, *words, timeout_s=_LIMIT_S, backend=backend)[0]

    found = measure(plan, run)
    processor = processor_name() if device == "cpu" else torch.cuda.get_device_name(0)
    cluster, observations = calibrate(found, plan, machine_name(processor, device, found.measurements.cores))
    seconds = time.perf_counter() - begin
    print("\n".join([*measured_lines(found, plan, seconds), "", *fit_lines(cluster, observations)]))
    _write(cluster, arguments.output)
    return 0


def _learn(arguments: CalibrateArguments, steps: Path) -> None:
    """Write a known cluster with the factors of the blocks of measured steps."""
    check(arguments.cluster is not None, "cluster must be given with --steps: it ran them (--cluster a100)")
    check(arguments.device is None, f"device={arguments.device!r} does not go with --steps, which measures nothing")
    if arguments.engine is not None:
        engine_of(arguments.engine)
    check_can_write("output", arguments.output)
    runs = read_steps(steps, arguments.ranks)
    cluster = with_measured_blocks(load_cluster(str(arguments.cluster)), runs, arguments.engine)
    print("\n".join(learned_lines(cluster, runs, arguments.engine)))
    _write(cluster, arguments.output)


def _write(cluster: Cluster, output: Path) -> None:
    try:
        replace_file(output, cluster_text(cluster).encode())
    except OSError as error:
        raise InputError(f"output={output} cannot be written: {error.strerror or error}") from None
    print(f"\nwritten: {output} (fused-megatron predict CONFIG --cluster {output})")


def measured_lines(found: Found, plan: Plan, seconds: float) -> Iterator[str]:
    """Return the measurements as lines."""
    measured = found.measurements
    what = "core" if plan.device == "cpu" else "GPU"
    threads = f" of {measured.threads} thread(s)" if plan.device == "cpu" else ""
    yield f"{measured.ranks} rank(s){threads} on {measured.cores} {what}(s), {seconds:.0f} s"
    if measured.busy_share > _BUSY:
        yield (
            f"warning: other processes held the cores for {measured.busy_share:.0%} of the time: "
            "calibrate again on an idle machine"
        )
    yield ""
    yield "measured on each rank while all ranks do the same:"
    rates = {shape: 6e-9 * m * n * k / s for shape, s in measured.products.items() for m, n, k in [shape]}
    yield _row("products, GFLOP/s", {"x".join(map(str, shape)): f"{rate:.3g}" for shape, rate in rates.items()})
    yield _row("memory, GB/s", {_size(b): f"{3e-9 * b / s:.3g}" for b, s in measured.memory.items()})
    yield _row("launch of an op, us", {"": f"{1e6 * measured.launch_s:.3g}"})
    yield from _transfer_lines(measured)


def _transfer_lines(measured: Measurements) -> Iterator[str]:
    for kind in dict.fromkeys(kind for kind, _ in measured.collectives):
        times = {_size(b): f"{1e6 * s:.3g}" for (other, b), s in measured.collectives.items() if other == kind}
        yield _row(f"{kind}, us", times)
    if measured.messages:
        yield _row("message, us", {_size(b): f"{1e6 * s:.3g}" for b, s in measured.messages.items()})


def fit_lines(cluster: Cluster, observations: list[Observation]) -> Iterator[str]:
    """Return lines that say how well the constants describe the measurements."""
    yield f"{'':24}  {'number':>6}  {'median error':>12}  {'largest':>8}"
    for kind, number, median, largest in error_table(cluster, observations):
        yield f"{kind:24}  {number:>6}  {median:>12.1%}  {largest:>8.1%}"
    yield ""
    yield f"{'training step':24}  {'measured, ms':>12}  {'predicted, ms':>13}  {'error':>7}"
    for one in observations:
        if one.kind == STEPS:
            predicted_s = one.predicted(cluster)
            yield (
                f"{one.label:24}  {1e3 * one.seconds:>12.1f}  {1e3 * predicted_s:>13.1f}  "
                f"{predicted_s / one.seconds - 1:>+7.1%}"
            )


def _row(title: str, cells: dict[str, str]) -> str:
    return f"  {title}: " + ", ".join(f"{name} {value}".strip() for name, value in cells.items())


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:g} {unit}"
    return f"{num_bytes} B"

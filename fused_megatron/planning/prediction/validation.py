"""Errors of predictions against measured steps, and what a choice by prediction would cost."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fused_megatron.config import TrainConfig
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.prediction.published_runs import PublishedRun
from fused_megatron.planning.prediction.step_time import StepPrediction, predict_step

_LEAST_LAYOUTS = 3
"""Measured layouts from which a workload has a choice."""


@dataclass(frozen=True)
class Compared:
    """A measured step beside its prediction.

    Attributes:
        run: the measured step.
        prediction: of this step.
        fitted: the cluster's constants, or a block of it, were fitted to this row.
    """

    run: PublishedRun
    prediction: StepPrediction
    fitted: bool

    @property
    def error(self) -> float:
        """Predicted over measured, minus 1."""
        return self.prediction.seconds / self.run.seconds - 1


@dataclass(frozen=True)
class ErrorSummary:
    """Sizes of errors, as shares.

    Attributes:
        number: of rows.
        mean, median, p95, largest: of the sizes of the errors.
        bias: median of the errors with their sign.
    """

    number: int
    mean: float
    median: float
    p95: float
    largest: float
    bias: float


def compare(runs: Sequence[PublishedRun], cluster: Cluster, engine: str | None = None) -> list[Compared]:
    """Predict each run on a cluster.

    Args:
        runs: measured steps.
        cluster: the machine that ran them.
        engine: the program that ran them; None: the one of the source.

    Raises:
        InputError: a run that no config of this package describes.
    """
    rows = set(cluster.fitted.rows if cluster.fitted else ())
    rows |= {row for block in cluster.blocks for row in block.rows}
    return [
        Compared(run, predict_step(run.config, cluster, engine=engine or run.engine), run.digest in rows)
        for run in runs
    ]


def by_fit(rows: Sequence[Compared]) -> dict[str, list[Compared]]:
    """Return the rows to which the constants were fitted, and all others, by the names of reports."""
    return {"fitted": [row for row in rows if row.fitted], "held out": [row for row in rows if not row.fitted]}


def summary(rows: Sequence[Compared]) -> ErrorSummary | None:
    """Summarise the errors of rows; None without rows."""
    if not rows:
        return None
    errors = [row.error for row in rows]
    return ErrorSummary(len(rows), *_sizes([abs(error) for error in errors]), statistics.median(errors))


def regrets(rows: Sequence[Compared]) -> list[float]:
    """Return for each workload by how much the layout that is predicted to be fastest is slower than the fastest.

    A workload is a model with a number of GPUs and a batch, and at least three measured layouts. Layouts that were
    predicted to be equally fast count by the first.
    """
    workloads: dict[tuple[object, ...], list[Compared]] = defaultdict(list)
    for row in rows:
        workloads[_workload(row.run.config)].append(row)
    found = []
    for layouts in workloads.values():
        if len(layouts) >= _LEAST_LAYOUTS:
            chosen = min(layouts, key=lambda row: row.prediction.seconds)
            found.append(chosen.run.seconds / min(row.run.seconds for row in layouts) - 1)
    return found


def mean_and_p95(sizes: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the 95 % quantile."""
    mean, _, p95, _ = _sizes(sizes)
    return mean, p95


def _sizes(sizes: Sequence[float]) -> tuple[float, float, float, float]:
    ordered = sorted(sizes)
    return statistics.fmean(ordered), statistics.median(ordered), ordered[round(0.95 * (len(ordered) - 1))], ordered[-1]


def _workload(config: TrainConfig) -> tuple[object, ...]:
    parallel, training = config.parallel, config.training
    # Some programs cut a vocabulary that tp does not divide.
    model = dataclasses.replace(config.model, recompute="none", vocab_size=None)
    return model, parallel.num_ranks, training.global_batch_size

"""Predicted step of a run beside the steps that the trainer measures: columns of the metrics, and both timelines."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fused_megatron.config import TrainConfig
from fused_megatron.mesh import Mesh
from fused_megatron.pipeline.schedule.action import Action
from fused_megatron.pipeline.view.recording import Recorder
from fused_megatron.pipeline.view.trace_file import write_trace
from fused_megatron.planning.amounts import seconds_text
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.prediction.step_time import StepPrediction, predict_step

PREDICTED, MEASURED, ERROR = "predicted_s", "step_s", "prediction_error"
"""Columns of the metrics: seconds, and predicted / measured - 1."""

RECORDED_STEP = 3
"""Step of a process whose timeline is recorded: the steps before it warm up."""


def predict_run(config: TrainConfig, mesh: Mesh, cluster: Cluster) -> StepPrediction:
    """Predict the step of a run on the ranks of its mesh.

    Raises:
        InputError: as predict_step.
    """
    parallel = dataclasses.replace(config.parallel, data_parallel_size=mesh.dp_size)
    return predict_step(dataclasses.replace(config, parallel=parallel), cluster)


def prediction_lines(prediction: StepPrediction, cluster: Cluster) -> list[str]:
    """Return the prediction as lines for the log of a run."""
    parts = sorted(prediction.parts.items(), key=lambda part: -part[1])
    shares = [f"{name} {seconds / prediction.seconds:.0%}" for name, seconds in parts if seconds > 0]
    line = f"predicted for {cluster.name}: {seconds_text(prediction.seconds)} a step"
    line += f" ({seconds_text(prediction.low_s)} to {seconds_text(prediction.high_s)}): {', '.join(shares)}"
    return [line, *(f"the prediction is outside of its data: {respect}" for respect in prediction.outside)]


def conclusion(records: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the median error of the steps in the metrics of a run as text; None if no prediction was logged.

    The first step is left out where others follow: it warms up.
    """
    steps = [record for record in records if ERROR in record]
    if not steps:
        return None
    steps = steps[1:] or steps
    predicted_s, measured_s, error = (
        statistics.median(record[name] for record in steps) for name in (PREDICTED, MEASURED, ERROR)
    )
    return f"{seconds_text(predicted_s)} predicted, {seconds_text(measured_s)} measured (median error {error:+.1%})"


class BesideMeasured:
    """Comparison of a run's measured steps with their prediction. Every rank makes one.

    Args:
        recorder: records the timeline of a step, over the ranks of this rank's pipeline.
        prediction: of a step; None on ranks other than 0.
        trace: the file for both timelines.
    """

    def __init__(self, recorder: Recorder, prediction: StepPrediction | None, trace: Path) -> None:
        self._recorder = recorder
        self._prediction = prediction
        self._trace = trace
        self._num_steps = 0

    def observe(self, action: Action, start: float, end: float) -> None:
        """Record an action of the recorded step; the executor's `observe`."""
        if self._num_steps == RECORDED_STEP:
            self._recorder(action, start, end)

    def begin_step(self) -> None:
        """Call this on every rank before each step.

        Communication: one barrier over the pipeline's ranks, before the recorded step.
        """
        self._num_steps += 1
        if self._num_steps == RECORDED_STEP:
            self._recorder.begin()

    def end_step(self, seconds: float) -> dict[str, float]:
        """Call this on every rank after each step; returns the columns of the step, {} on ranks other than 0.

        Writes the predicted and the measured timeline after the recorded step.

        Args:
            seconds: measured time of the step.

        Communication: two all-gathers over the pipeline's ranks, after the recorded step.
        """
        measured = self._recorder.timeline(MEASURED) if self._num_steps == RECORDED_STEP else None
        if self._prediction is None:
            return {}
        if measured is not None:
            write_trace({"predicted": self._prediction.timeline, "measured": measured}, self._trace)
        predicted_s = self._prediction.seconds
        return {MEASURED: seconds, PREDICTED: predicted_s, ERROR: predicted_s / seconds - 1}

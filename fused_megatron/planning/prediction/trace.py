"""Trace of a predicted step, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from pathlib import Path

from fused_megatron.pipeline.view import trace_file
from fused_megatron.planning.prediction.step_time import StepPrediction


def write_trace(prediction: StepPrediction, path: Path) -> None:
    """Write the predicted timeline in Chrome's trace format: a row for each pipeline rank, a box for each action.

    Raises:
        InputError: the file cannot be written.
    """
    trace_file.write_trace({"predicted": prediction.timeline}, path)

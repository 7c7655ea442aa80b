"""Report of a training run with training.cluster: errors of the prediction, and both timelines on one page."""

from pathlib import Path
from typing import Any

from fused_megatron.benchmarking.comparison_table import markdown
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import InputError
from fused_megatron.durable import replace_file
from fused_megatron.pipeline.view.timeline import to_svg_page
from fused_megatron.pipeline.view.trace_file import read_trace
from fused_megatron.planning.prediction.beside_measured import ERROR, MEASURED, PREDICTED, conclusion, seconds_text

PAGE = "timelines.svg"


def run_lines(path: Path, plots: Path | None = None) -> list[str]:
    """Draw the timelines of a run, and return the lines of its report.

    Args:
        path: the run folder.
        plots: a folder for the picture; None: the run folder.

    Raises:
        InputError: the run logged no prediction, its timelines cannot be read, or the picture cannot be written.
    """
    run = RunFolder(path)
    try:
        steps = [record for record in run.read_metrics() if ERROR in record]
    except OSError as error:
        raise InputError(f"{run.metrics}: {error.strerror or error}") from None
    told = conclusion(steps)
    if told is None:
        raise InputError(f"{path} has no step with a prediction (train with training.cluster, e.g. h100)")
    lines = [f"# {path.name}: predicted beside measured", "", f"A step: {told}; {len(steps)} steps.", ""]
    lines += markdown(("step", "measured, ms", "predicted, ms", "error"), [_row(record) for record in _some(steps)])
    if run.timelines.exists():
        picture = (path if plots is None else plots) / PAGE
        _draw(run, picture)
        lines += ["", f"![timelines of a step, predicted and measured]({picture})"]
        lines += ["", f"ui.perfetto.dev opens {run.timelines}."]
    return lines


def _row(record: dict[str, Any]) -> list[str]:
    milliseconds = (f"{1e3 * record[name]:.1f}" for name in (MEASURED, PREDICTED))
    return [f"{record['step']}", *milliseconds, f"{record[ERROR]:+.1%}"]


def _some(steps: list[dict[str, Any]], most: int = 12) -> list[dict[str, Any]]:
    """Return steps at equal distances, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _draw(run: RunFolder, picture: Path) -> None:
    timelines = read_trace(run.timelines)
    titled = {}
    for name, timeline in timelines.items():
        busy = max(timeline.busy, default=0.0) / (timeline.makespan or 1.0)
        titled[f"{name}: {seconds_text(timeline.makespan)}, of which the busiest rank works {busy:.0%}"] = timeline
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        replace_file(picture, to_svg_page(f"{run.path.name}: a step", titled).encode())
    except OSError as error:
        raise InputError(f"plots={picture.parent}: {error.strerror or error}") from None

"""Picture of an experiment as an SVG: measured beside predicted, and predicted beside published."""

from itertools import cycle
from pathlib import Path
from typing import Any

from fused_megatron.benchmarking.report.experiment_results import (
    LOSS,
    CheckedStatement,
    ExperimentResult,
    MeasuredRun,
    PublishedFigure,
)

INK = "#7d7d7d"
"""Colour of text and lines: as far from white as from black, so that a page of either colour shows it."""
MEASURED, PREDICTED, PUBLISHED = "#4477aa", "#ee8866", "#bb5588"
_CURVES = (MEASURED, PREDICTED, PUBLISHED, "#228833", "#aa8800", "#66aacc")
_WIDTH, _HEIGHT = 4.6, 3.4
_MOST_PANELS = 2
"""Of the statements, and of the published figures."""
_NAME_CHARACTERS = 12


def draw_experiment(result: ExperimentResult, path: Path) -> bool:
    """Draw the statements and the published figures of a result into an SVG; return False without matplotlib.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        from matplotlib import rc_context  # noqa: PLC0415 - an extra, and slow to import
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        return False
    titles = dict.fromkeys(each.figure for each in result.published if each.predicted is not None)
    groups = [[each for each in result.published if each.figure == title] for title in titles]
    curves = [run for run in result.runs if _curve(run)]
    panels: list[Any] = [*([curves] if curves else []), *result.statements[:_MOST_PANELS], *groups[:_MOST_PANELS]]
    with rc_context(_settings()):
        figure = Figure(figsize=(_WIDTH * len(panels), _HEIGHT), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            if panel is curves:
                _draw_curves(axes, curves)
            elif isinstance(panel, CheckedStatement):
                _draw_statement(axes, panel)
            else:
                _draw_published(axes, panel)
        figure.suptitle(f"{result.id}  {result.title}", fontsize=10, color=INK)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None})
    return True


def _settings() -> Any:
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return {
        **dict.fromkeys(names, INK),
        "text.parse_math": False,
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "experiment",
    }


def _curve(run: MeasuredRun) -> dict[int, float]:
    """Return the losses of a run by step; empty if it did not train."""
    names = {name: name.removeprefix(LOSS) for name in run.figures if name.startswith(LOSS)}
    return {int(step): run.figures[name] for name, step in names.items() if step.isdigit()}


def _draw_curves(axes: Any, runs: list[MeasuredRun]) -> None:
    for run, colour in zip(runs, cycle(_CURVES), strict=False):
        losses = _curve(run)
        axes.plot(list(losses), list(losses.values()), lw=1.3, color=colour, label=run.case)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=7)


def _draw_statement(axes: Any, statement: CheckedStatement) -> None:
    points = statement.points
    places = range(len(points))
    axes.bar(places, [point.measured for point in points], 0.6, color=MEASURED, label="measured")
    if statement.kind != "order":
        label = "limit" if statement.kind == "at_most" else "predicted"
        axes.plot(places, [point.predicted for point in points], "_", ms=22, mew=2.5, color=PREDICTED, label=label)
    _name_places(axes, [point.case for point in points])
    axes.set_ylabel(statement.quantity)
    axes.set_title("holds" if statement.holds else "does not hold", fontsize=8)
    axes.margins(y=0.2)  # room for the legend above the bars
    axes.legend(frameon=False, fontsize=7, loc="upper left", ncols=2)


def _draw_published(axes: Any, figures: list[PublishedFigure]) -> None:
    places = range(len(figures))
    values = [each.predicted or 0.0 for each in figures]
    below = [value - (each.low if each.low is not None else value) for value, each in zip(values, figures, strict=True)]
    above = [
        (each.high if each.high is not None else value) - value for value, each in zip(values, figures, strict=True)
    ]
    axes.errorbar(places, values, yerr=[below, above], fmt="o", color=PREDICTED, capsize=4, label="predicted")
    known = [(place, each.published) for place, each in zip(places, figures, strict=True) if each.published is not None]
    if known:
        axes.plot(*zip(*known, strict=True), "D", mfc="none", mew=1.5, ms=8, color=PUBLISHED, label="published")
    _name_places(axes, [each.run for each in figures])
    axes.set_ylim(0)
    axes.set_ylabel(figures[0].figure)
    axes.legend(frameon=False, fontsize=7)


def _name_places(axes: Any, names: list[str]) -> None:
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    if max(map(len, names)) * len(names) > 4 * _NAME_CHARACTERS:
        axes.tick_params(axis="x", labelrotation=30)

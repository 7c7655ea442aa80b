"""Text of a report on an experiment: its measurements, the verdict on its trends, and the published figures."""

from collections.abc import Sequence

from fused_megatron.benchmarking.report.experiment_results import (
    LOSS,
    CheckedStatement,
    ExperimentResult,
    MeasuredRun,
    PublishedFigure,
)

HOLDS, FAILS = "holds", "does not hold"
# Figures of every run, in the order of the table: name, title, and bytes or not.
_COLUMNS = (
    ("parameters", "parameters"),
    ("weights", "weights"),
    ("versions", "versions of weights"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("gathered", "weights of others"),
    ("kept", "kept a microbatch"),
    ("peak", "peak"),
    ("flops", "FLOPs"),
    ("bubble", "bubble"),
    ("held", "activations at once"),
    ("bytes_on_link", "over the cable"),
    ("link_ms", "cable, ms"),
    ("free_ms", "step without limit, ms"),
    ("loss_early", "loss, second quarter"),
    ("loss_end", "loss, last quarter"),
    ("step_ms", "step, ms"),
    ("exposed_ms", "cable left over, ms"),
)
_SENT = "sent_"
_SHARES = {"bubble"}


def experiment_lines(result: ExperimentResult) -> list[str]:
    """Return the whole report on an experiment."""
    lines = [f"{result.id}  {result.title}", "", result.why, ""]
    lines += [f"On this machine ({_settings(result)}; bytes of the rank that has most):", "", *_runs(result.runs)]
    for statement in result.statements:
        lines += ["", f"{statement.text}: {_verdict(statement)}", "", *_points(statement)]
    if result.published:
        lines += ["", f"On the published machine ({result.source}):", "", *published_lines(result.published)]
    if result.notes:
        lines += ["", *(f"Note: {note}" for note in result.notes)]
    return lines


def overview_lines(results: Sequence[ExperimentResult]) -> list[str]:
    """Return a table with one row for each experiment: its trends, and how many published figures it meets."""
    rows = [["id", "experiment", "statements", "verdict", "published figures inside the error bar", "s"]]
    for result in results:
        known = [each.inside for each in result.published if each.inside is not None]
        failed = [each for each in result.statements if not each.holds]
        verdict = HOLDS if not failed else f"{FAILS}: {', '.join(each.quantity for each in failed)}"
        inside = f"{sum(known)} of {len(known)}" if known else ""
        cells = [str(result.id), result.title, str(len(result.statements)), verdict, inside, f"{result.seconds:.0f}"]
        rows.append(cells)
    failed_ids = [str(result.id) for result in results if not result.holds]
    said = f"{len(results) - len(failed_ids)} of {len(results)} experiments hold"
    return [*_table(rows), "", said + (f"; not: {', '.join(failed_ids)}" if failed_ids else "")]


def _verdict(statement: CheckedStatement) -> str:
    late = " (a time: only an idle machine shows it)" if statement.timed and not statement.holds else ""
    return (HOLDS if statement.holds else FAILS) + late


def _settings(result: ExperimentResult) -> str:
    return ", ".join([*(f"{name} {value}" for name, value in result.settings.items()), result.date])


def _runs(runs: Sequence[MeasuredRun]) -> list[str]:
    columns = [(name, title) for name, title in _COLUMNS if any(run.figures.get(name) for run in runs)]
    sent = {name: None for run in runs for name in run.figures if name.startswith(_SENT)}
    columns += [(name, f"sent over {name[len(_SENT) :].replace('_', '+')}") for name in sent]
    rows = [["run", "layout", *(title for _, title in columns)]]
    for run in runs:
        cells = [_shown(name, run.figures.get(name)) for name, _ in columns]
        rows.append([run.case, run.layout, *cells])
    return _table(rows)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name in _SHARES:
        return f"{value:.1%}"
    if name.startswith(LOSS):
        return f"{value:.4f}"
    return f"{value:,.1f}" if name.endswith("_ms") else f"{value:,.0f}"


def _points(statement: CheckedStatement) -> list[str]:
    if statement.kind == "order":
        return _table([["run", statement.quantity], *([p.case, _number(p.measured)] for p in statement.points)])
    head = "at most" if statement.kind == "at_most" else "predicted"
    rows = [["run", f"{statement.quantity}, {head}", "measured"]]
    rows += [[point.case, _number(point.predicted), _number(point.measured)] for point in statement.points]
    return _table(rows)


def published_lines(figures: Sequence[PublishedFigure]) -> list[str]:
    """Return the table of predictions beside published figures."""
    rows = [["run", "layout", "figure", "predicted", "error bar", "published"]]
    for each in figures:
        bar = "" if each.low is None or each.high is None else f"{_number(each.low)} to {_number(each.high)}"
        cells = [each.run, each.layout, each.figure, _number(each.predicted), bar, _number(each.published)]
        rows.append(cells)
    return _table(rows)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value == round(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---", "---", *["--:"] * (len(head) - 2)], *body)]

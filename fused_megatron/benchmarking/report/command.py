"""`fused-megatron report FILE...`: results as Markdown tables and pictures; two files of a theme compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fused_megatron.benchmarking.report.plots import plot_results
from fused_megatron.benchmarking.report.results_file import Results, read_results
from fused_megatron.benchmarking.report.tables import head_lines, results_lines
from fused_megatron.benchmarking.report.two_runs import (
    SLOWER,
    change_table,
    compare_runs,
    no_longer_measured,
    verdict_line,
)
from fused_megatron.checks import InputError


@dataclass(frozen=True)
class ReportArguments:
    """Results files of make bench as tables and plots; two of the same theme compared."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """benchmarks/results/<theme>_<hardware>_<yyyymm>.json, or a file of pytest-benchmark. Of two files of the same
    theme (and, among more than two, of the same hardware) the later one is compared with the earlier: what has become
    faster or slower since. Exit code 1 for a regression."""
    plots: Path | None = None
    """A folder for pictures (needs matplotlib)."""
    write: Path | None = None
    """A Markdown file for the tables; default: printed."""


def run_report(arguments: ReportArguments) -> int:
    """Print or write what was asked for; 1 where a later file is slower or has lost a figure.

    Raises:
        InputError: a file that is missing, damaged, of another version, or no results; pictures without matplotlib.
    """
    if not arguments.files:
        raise InputError("report needs a results file (make bench writes them to benchmarks/results)")
    lines, code = report_lines([read_results(path) for path in arguments.files], arguments.plots)
    text = "\n".join(lines) + "\n"
    if arguments.write is None:
        print(text, end="")
        return code
    try:
        arguments.write.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"write={arguments.write}: {error.strerror}") from None
    return code


def report_lines(files: Sequence[Results], plots: Path | None = None) -> tuple[list[str], int]:
    """What is to be said of all files, pictures made; 1 where a later one is slower or has lost a figure.

    Raises:
        InputError: more than two files to compare, no case in common; pictures without matplotlib, or not writable.
    """
    lines: list[str] = []
    worst = 0
    for group in _grouped(files):
        some, code = (results_lines(group[0]), 0) if len(group) == 1 else _two(*group)
        if plots is not None:
            written = plot_results(group[-1], plots)
            some += ["", *(f"![{path.stem}]({path})" for path in written)] if written else []
        lines += ([""] if lines else []) + some
        worst = max(worst, code)
    return lines, worst


def _grouped(files: Sequence[Results]) -> list[list[Results]]:
    """Those that belong side by side, in the order of their first."""
    groups: dict[tuple[str, ...], list[Results]] = {}
    for results in files:
        key = (results.theme, results.hardware) if len(files) > 2 else (results.theme,)
        groups.setdefault(key, []).append(results)
    for group in groups.values():
        if len(group) > 2:
            theme, hardware = group[0].theme, group[0].hardware
            raise InputError(f"{len(group)} files of {theme} on {hardware}: at most two can be compared")
    return list(groups.values())


def _two(before: Results, after: Results) -> tuple[list[str], int]:
    changes = compare_runs(before.comparisons, after.comparisons)
    lost = no_longer_measured(before.comparisons, after.comparisons)
    if not changes and not lost:
        raise InputError(f"the two files of {before.theme} have no case in common")
    lines = [*head_lines(before, "before: "), *head_lines(after, "after: ")]
    if before.hardware != after.hardware:
        lines.append("not the same hardware: what became slower against the op beside it may be the hardware's doing")
    lines += ["", *change_table(changes), "", *(f"no longer measured: {line}" for line in lost)]
    lines.append(verdict_line(changes, before.comparisons, after.comparisons))
    return lines, int(bool(lost) or any(one.verdict == SLOWER for one in changes))

"""The command `fused-megatron report FILE...`: its arguments, and the text that it prints."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fused_megatron.benchmarking.report.experiment_page import experiment_lines, overview_lines
from fused_megatron.benchmarking.report.experiment_results import read_experiment
from fused_megatron.benchmarking.report.plots import plot_results
from fused_megatron.benchmarking.report.results_file import Results, read_results
from fused_megatron.benchmarking.report.run_page import run_lines
from fused_megatron.benchmarking.report.tables import head_lines, results_lines
from fused_megatron.benchmarking.report.two_runs import (
    SLOWER,
    change_table,
    compare_runs,
    no_longer_measured,
    verdict_line,
)
from fused_megatron.checks import InputError
from fused_megatron.terminal_tables import print_report


@dataclass(frozen=True)
class ReportArguments:
    """Results files of make bench as tables and plots; two of the same theme compared. Runs with a prediction: its
    errors, and the predicted and the measured timeline on one page."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """benchmarks/results/<theme>_<hardware>_<yyyymm>.json, or a file of pytest-benchmark. Two files of the same theme
    (with more than two files: of the same theme and hardware) are compared: the report says what is faster or slower
    in the second. Exit code 1 for a regression. The folder of a run that was trained with training.cluster gives a
    report of its predicted and measured steps. The results of `fused-megatron experiment` are shown as it printed
    them."""
    plots: Path | None = None
    """A folder for plots (needs matplotlib). The picture of a run needs none; by default it is in the run folder."""
    write: Path | None = None
    """A Markdown file for the tables; default: print them."""


def run_report(arguments: ReportArguments) -> int:
    """Print or write the report; return 1 if a second file is slower or has lost a figure, else 0.

    Raises:
        InputError: a file is missing, damaged, of another version, or holds no results; or matplotlib is missing.
    """
    if not arguments.files:
        raise InputError("report needs a results file (make bench writes them to benchmarks/results)")
    runs = [path for path in arguments.files if path.is_dir()]
    others = [(path, read_experiment(path)) for path in arguments.files if path not in runs]
    experiments = [each for _, each in others if each is not None]
    files = [read_results(path) for path, each in others if each is None]
    lines, code = report_lines(files, arguments.plots)
    for each in experiments:
        lines += [*([""] if lines else []), *experiment_lines(each)]
    if len(experiments) > 1:
        lines += ["", *overview_lines(experiments)]
    for path in runs:
        lines += [*([""] if lines else []), *run_lines(path, arguments.plots)]
    text = "\n".join(lines) + "\n"
    if arguments.write is None:
        print_report(text.rstrip("\n"))
        return code
    try:
        arguments.write.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"write={arguments.write}: {error.strerror}") from None
    return code


def report_lines(files: Sequence[Results], plots: Path | None = None) -> tuple[list[str], int]:
    """Draw the plots; return the lines of the report, and 1 if a second file is slower or has lost a figure, else 0.

    Raises:
        InputError: more than two files to compare; no case in common; no matplotlib; or plots cannot be written.
    """
    lines: list[str] = []
    worst = 0
    for group in _grouped(files):
        some, code = (results_lines(group[0]), 0) if len(group) == 1 else _comparison_lines(*group)
        if plots is not None:
            written = plot_results(group[-1], plots)
            some += ["", *(f"![{path.stem}]({path})" for path in written)] if written else []
        lines += ([""] if lines else []) + some
        worst = max(worst, code)
    return lines, worst


def _grouped(files: Sequence[Results]) -> list[list[Results]]:
    """Group the files that are compared with each other, in the order of their first file."""
    groups: dict[tuple[str, ...], list[Results]] = {}
    for results in files:
        key = (results.theme, results.hardware) if len(files) > 2 else (results.theme,)
        groups.setdefault(key, []).append(results)
    for group in groups.values():
        if len(group) > 2:
            theme, hardware = group[0].theme, group[0].hardware
            raise InputError(f"{len(group)} files of {theme} on {hardware}: at most two can be compared")
    return list(groups.values())


def _comparison_lines(before: Results, after: Results) -> tuple[list[str], int]:
    changes = compare_runs(before.comparisons, after.comparisons)
    lost = no_longer_measured(before.comparisons, after.comparisons)
    if not changes and not lost:
        raise InputError(f"the two files of {before.theme} have no case in common")
    lines = [*head_lines(before, "before: "), *head_lines(after, "after: ")]
    if before.hardware != after.hardware:
        lines.append("not the same hardware: a slower ratio may come from the hardware, not from the op")
    lines += ["", *change_table(changes), "", *(f"no longer measured: {line}" for line in lost)]
    lines.append(verdict_line(changes, before.comparisons, after.comparisons))
    return lines, int(bool(lost) or any(one.verdict == SLOWER for one in changes))

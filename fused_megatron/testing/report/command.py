"""`fused-megatron report FILE [LATER_FILE]`: results as Markdown tables and pictures; two files compared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fused_megatron.checks import InputError
from fused_megatron.testing.comparison_table import memory_table, milliseconds_table, remarks, speed_table
from fused_megatron.testing.report.plots import plot_results
from fused_megatron.testing.report.results_file import Results, read_results
from fused_megatron.testing.report.two_runs import SLOWER, change_table, compare_runs, no_longer_measured, verdict_line


@dataclass(frozen=True)
class ReportArguments:
    """A results file of make bench as tables and plots, or two of them compared."""

    file: Annotated[Path, tyro.conf.Positional]
    """benchmarks/results/<theme>_<hardware>_<yyyymm>.json, or a file of pytest-benchmark."""
    other: Annotated[Path | None, tyro.conf.Positional] = None
    """A later file: what has become faster or slower since. Exit code 1 for a regression."""
    plots: Path | None = None
    """A folder for pictures (needs matplotlib)."""
    write: Path | None = None
    """A Markdown file for the tables; default: printed."""


def run_report(arguments: ReportArguments) -> int:
    """Print or write what was asked for; 1 where the second file is slower or has lost a figure.

    Raises:
        InputError: a file that is missing, damaged, of another version, or no results; pictures without matplotlib.
    """
    results = [read_results(path) for path in (arguments.file, arguments.other) if path is not None]
    lines, code = _one(results[0]), 0
    if len(results) == 2:
        lines, code = _two(*results)
    if arguments.plots is not None:
        written = plot_results(results[-1], arguments.plots)
        if not written and any(case.seconds for case in results[-1].comparisons):
            raise InputError('plots need matplotlib: pip install "matplotlib>=3.8"')
        lines += ["", *(f"![{path.stem}]({path})" for path in written)]
    text = "\n".join(lines) + "\n"
    if arguments.write is None:
        print(text, end="")
        return code
    try:
        arguments.write.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"write={arguments.write}: {error.strerror}") from None
    return code


def _head(results: Results, which: str = "") -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items())
    lines = [f"{which}{results.theme}, {results.hardware}, {results.date}" + (f" ({settings})" if settings else "")]
    if not results.complete:
        lines.append(f"interrupted: {len(results.comparisons)} cases were measured before that")
    return lines


def _one(results: Results) -> list[str]:
    comparisons = results.comparisons
    lines = [*_head(results), "", "x: how many times faster ours is, median of the rounds [20-80 %]", ""]
    lines += [*speed_table(comparisons), ""]
    lines += [*milliseconds_table(comparisons, any(c.default_malloc_ms for c in comparisons)), ""]
    if any(c.peak_bytes or c.traffic for c in comparisons):
        lines += [*memory_table(comparisons), ""]
    return [*lines, *remarks(comparisons)]


def _two(before: Results, after: Results) -> tuple[list[str], int]:
    changes = compare_runs(before.comparisons, after.comparisons)
    lost = no_longer_measured(before.comparisons, after.comparisons)
    if not changes and not lost:
        raise InputError("the two files have no case in common")
    lines = [*_head(before, "before: "), *_head(after, "after: ")]
    if before.hardware != after.hardware:
        lines.append("not the same hardware: what became slower against the op beside it may be the hardware's doing")
    lines += ["", *change_table(changes), "", *(f"no longer measured: {line}" for line in lost)]
    lines.append(verdict_line(changes, before.comparisons, after.comparisons))
    return lines, int(bool(lost) or any(one.verdict == SLOWER for one in changes))

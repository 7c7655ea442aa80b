"""Text of a report on one results file: head, tables and remarks."""

from collections.abc import Sequence

from fused_megatron.benchmarking.comparison_table import (
    bar_verdicts,
    breakdown_table,
    limits_table,
    memory_table,
    milliseconds_table,
    phases_table,
    provider_table,
    remarks,
    scaling_table,
    speed_table,
)
from fused_megatron.benchmarking.report.ceilings import COPY, FORMULAS, Ceilings
from fused_megatron.benchmarking.report.results_file import Results
from fused_megatron.benchmarking.side_by_side import BETWEEN_RUNS, BOUND, COMPILE, EAGER, OURS, Comparison

_KEY = (
    "x: how many times faster ours is, the median of the rounds' own ratios [20-80 %]. even: that spread includes 1, "
    f"or the median is within {BETWEEN_RUNS:g}x of 1, as far as medians of the same code move between two runs."
)

_SMOKE = "a smoke run: tiny sizes and two rounds show that everything runs, and say nothing about what is faster"


def head_lines(results: Results, which: str = "") -> list[str]:
    """Return the lines with theme, machine, date and settings, and a line if the run was interrupted."""
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items())
    lines = [f"{which}{results.theme}, {results.hardware}, {results.date}" + (f" ({settings})" if settings else "")]
    if not results.complete:
        lines.append(f"interrupted: {len(results.comparisons)} cases were measured before that")
    return lines


def results_lines(results: Results, brief: bool = False, *, verdicts: bool = True) -> list[str]:
    """Return the whole report on one file.

    Args:
        results: of the file.
        brief: for ops, show only the table of speed-ups.
        verdicts: False for a smoke run: no verdicts, and a line that says so.
    """
    cases = results.comparisons
    if not cases:
        return [*head_lines(results), "no case was measured"]
    if not verdicts:
        return [*head_lines(results), _SMOKE, "", *speed_table(cases, verdicts=False), "", *remarks(cases)]
    lines = [*head_lines(results), *_ceiling_line(results), _KEY]
    lines += _op_lines(results, brief) if _plain_ops(cases) else _provider_lines(results)
    return [*lines, "", *remarks(cases)]


def _ceiling_line(results: Results) -> list[str]:
    limits = []
    for name, value in results.ceilings.items():
        what, _, dtype = name.partition(" ")
        limits.append(f"copy {value:.1f} GB/s" if what == COPY else f"product of {dtype} {value:.3g} GFLOP/s")
    return [f"limits, measured in the same run: {', '.join(limits)}"] if limits else []


def _plain_ops(cases: Sequence[Comparison]) -> bool:
    """Return whether ours is compared only with plain torch, so that one row for each case is enough."""
    return all(c.tokens is None and {*c.seconds} <= {OURS, EAGER, COMPILE, BOUND} for c in cases)


def _op_lines(results: Results, brief: bool) -> list[str]:
    cases = results.comparisons
    lines = ["bound: a copy of the bytes that must move, between buffers that exist", "", *speed_table(cases)]
    if brief:
        return lines
    if any(c.model_flops for c in cases):
        lines += [
            "",
            "Ours beside this machine's limits (roof: the lower of copy speed x FLOP per byte, and product):",
        ]
        lines += ["", *limits_table(cases, Ceilings(results.ceilings))]
    lines += ["", "Milliseconds, forward and backward together:"]
    lines += ["", *milliseconds_table(cases, any(c.default_malloc_ms for c in cases))]
    if any(c.forward_seconds for c in cases):
        lines += ["", "Milliseconds, forward + backward:", "", *phases_table(cases)]
    if any(c.peak_bytes or c.traffic for c in cases):
        lines += ["", *memory_table(cases)]
    return lines


def _provider_lines(results: Results) -> list[str]:
    cases, ceilings = results.comparisons, Ceilings(results.ceilings)
    lines = ["", *provider_table(cases, ceilings)]
    steps = [c for c in cases if c.tokens is not None]
    if any(ceilings.share_of_gemm(c, OURS, c.model_flops) for c in steps):
        lines += ["", *FORMULAS]
    bars = [f"{c.name}: {'; '.join(verdicts)}" for c in cases if (verdicts := bar_verdicts(c))]
    lines += ["", *bars] if bars else []
    if any(c.breakdown for c in cases):
        lines += [
            "",
            "Where a step's time goes, of steps measured apart (communication: exposed, nothing ran beside it; step",
            "ms: the median of the timed steps, from which the speed-ups come):",
        ]
        lines += ["", *breakdown_table(cases)]
    if any(c.forward_seconds for c in cases):
        lines += ["", "Milliseconds, forward + backward:", "", *phases_table(cases)]
    if is_scaling(results):
        lines += ["", "Weak scaling, ours:", "", *scaling_table(cases)]
    return lines


def is_scaling(results: Results) -> bool:
    """Return whether the cases measure scaling over the number of ranks."""
    known = {c.ranks for c in results.comparisons if c.seconds.get(OURS) and c.tokens is not None}
    return results.theme == "node" and len(known) > 1

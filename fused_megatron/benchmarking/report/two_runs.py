"""Comparison of two benchmark runs: which cases are faster, slower or even.

Runs are compared by ratios, not by milliseconds: how many times faster our op is than another provider in the same run.
The speed of the machine and its other load affect both the same.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fused_megatron.benchmarking.comparison_table import markdown
from fused_megatron.benchmarking.side_by_side import (
    BETWEEN_RUNS,
    BOUND,
    EAGER,
    EVEN,
    FASTER,
    OURS,
    SLOWER,
    Comparison,
    Spread,
)

# The load of a machine changes slowly, so that the median of a run is hardly more certain than one of its rounds. 54
# ratios were measured twice on two shared cores: 48 changed by less than both spreads together, and 53 by less than
# this factor times that.
_CERTAIN = 1.5


@dataclass(frozen=True)
class Change:
    """One case in two runs.

    Attributes:
        name: of the case.
        beside: provider whose time over ours is compared, the same in both runs; "" if there is none.
        before, after: this ratio in each run.
        change: after over before; above 1: ours has become faster.
        noise: a change within [1 / noise, noise] is not significant.
        verdict: "faster", "even" or "SLOWER"; "-" without a figure in one run or both.
    """

    name: str
    beside: str = ""
    before: Spread | None = None
    after: Spread | None = None
    change: float = 1.0
    noise: float = 1.0
    verdict: str = "-"


def compare_runs(before: Sequence[Comparison], after: Sequence[Comparison]) -> list[Change]:
    """Return the change of every case that both runs have, in the order of the second run."""
    earlier = {comparison.name: comparison for comparison in before}
    return [_change(earlier[one.name], one) for one in after if one.name in earlier]


def _change(before: Comparison, after: Comparison) -> Change:
    best = before.best_other()
    for beside in (EAGER, BOUND, *([best] if best else []), *before.seconds):
        if beside == OURS:
            continue
        ratios = [comparison.ratio(beside) for comparison in (before, after)]
        if ratios[0] is not None and ratios[1] is not None:
            first, second = ratios[0], ratios[1]
            change = second.median / first.median
            noise = noise_of(first, second)
            verdict = EVEN if 1 / noise <= change <= noise else FASTER if change > 1 else SLOWER
            return Change(after.name, beside, first, second, change, noise, verdict)
    return Change(after.name)


def noise_of(first: Spread, second: Spread) -> float:
    """Return the factor by which the medians of two runs may differ by chance.

    It combines the spreads (20th to 80th percentile) of both runs as independent errors, times _CERTAIN. It is never
    less than BETWEEN_RUNS.
    """
    spreads = [math.log(max(s.high / s.median, s.median / s.low)) for s in (first, second)]
    return max(BETWEEN_RUNS, math.exp(_CERTAIN * math.hypot(*spreads)))


def change_table(changes: Iterable[Change]) -> list[str]:
    """Tabulate a row for each case, slower cases first."""
    order = [SLOWER, FASTER, EVEN, "-"]
    rows = [
        [
            one.name,
            one.beside or "-",
            _spread(one.before),
            _spread(one.after),
            f"{one.change:.2f}x" if one.beside else "-",
            f"{one.noise:.2f}x" if one.beside else "-",
            one.verdict,
        ]
        for one in sorted(changes, key=lambda one: order.index(one.verdict))
    ]
    return markdown(["case", "beside", "x before", "x after", "change", "noise", "verdict"], rows)


def _spread(spread: Spread | None) -> str:
    return f"{spread.median:.2f} [{spread.low:.2f}-{spread.high:.2f}]" if spread else "-"


def verdict_line(changes: Sequence[Change], before: Sequence[Comparison], after: Sequence[Comparison]) -> str:
    """Summarise the comparison in a sentence."""
    counts = {verdict: sum(one.verdict == verdict for one in changes) for verdict in (SLOWER, FASTER, EVEN, "-")}
    names = [{one.name for one in run} for run in (before, after)]
    parts = [f"{counts[SLOWER]} slower, {counts[FASTER]} faster, {counts[EVEN]} even"]
    parts += [f"{counts['-']} without figures in both"] if counts["-"] else []
    parts += [f"{len(names[0] - names[1])} only before"] if names[0] - names[1] else []
    parts += [f"{len(names[1] - names[0])} only after"] if names[1] - names[0] else []
    return ", ".join(parts) + (": a regression" if counts[SLOWER] else ": no regression")


def no_longer_measured(before: Sequence[Comparison], after: Sequence[Comparison]) -> list[str]:
    """Return a line for each case that has lost the figure for our op, for example since its result is now wrong."""
    gone = {one.name: one.faults.get(OURS, "no figure") for one in after if not one.seconds.get(OURS)}
    return [f"{one.name}: {gone[one.name]}" for one in before if one.seconds.get(OURS) and one.name in gone]

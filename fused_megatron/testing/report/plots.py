"""Pictures of results: how many times faster, and how near the speed of a copy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_megatron.testing.report.results_file import Results
from fused_megatron.testing.side_by_side import BOUND, COMPILE, EAGER, OURS, Comparison

_COLORS = {EAGER: "tab:blue", COMPILE: "tab:orange"}


def plot_results(results: Results, folder: Path) -> list[Path]:
    """Write speed_up.png, and copy_speed.png where bytes were counted; returns their paths, () without matplotlib."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, and slow to import
    except ImportError:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    cases = [one for one in results.comparisons if one.seconds.get(OURS)]
    drawings = [("speed_up.png", _speed_up, [c for c in cases if c.ratio(EAGER) or c.ratio(COMPILE)])]
    drawings += [("copy_speed.png", _copy_speed, [c for c in cases if c.gb_per_s() and c.over_bound()])]
    written = []
    for name, draw, some in drawings:
        if not some:
            continue
        figure = Figure(figsize=(8.5, 1.4 + 0.42 * len(some)), layout="constrained")
        axes = figure.subplots()
        draw(axes, some)
        axes.set_title(f"{results.theme}, {results.hardware}, {results.date}", fontsize=10)
        figure.savefig(folder / name, dpi=120)
        written.append(folder / name)
    return written


def _rows(axes: Any, cases: Sequence[Comparison]) -> None:
    """A row a case, the first on top."""
    axes.set_yticks(range(len(cases)), [case.name for case in cases], fontsize=8)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _speed_up(axes: Any, cases: Sequence[Comparison]) -> None:
    for offset, name in ((-0.2, EAGER), (0.2, COMPILE)):
        found = [(i, ratio) for i, case in enumerate(cases) if (ratio := case.ratio(name))]
        if not found:
            continue
        medians = [ratio.median for _, ratio in found]
        spread = [[r.median - r.low for _, r in found], [r.high - r.median for _, r in found]]
        places = [i + offset for i, _ in found]
        axes.barh(places, medians, 0.38, color=_COLORS[name], label=f"{name}'s time / ours", alpha=0.85)
        axes.errorbar(medians, places, xerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        for place, (_, ratio) in zip(places, found, strict=True):
            axes.annotate(
                f"{ratio.median:.2g}x", (ratio.high, place), xytext=(4, 0), textcoords="offset points", va="center",
                fontsize=7,
            )  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.08)
    axes.set_xlabel("how many times faster ours is (bar: median of the rounds; line: 20th to 80th percentile)")
    _rows(axes, cases)
    axes.figure.legend(fontsize=8, loc="outside lower right", ncols=2)


def _copy_speed(axes: Any, cases: Sequence[Comparison]) -> None:
    """The memory side of a roofline: bytes that must move a second, ours and a copy's."""
    for name, offset, color, label in (
        (OURS, -0.2, "tab:green", "ours"), (BOUND, 0.2, "lightgray", "a copy of the same bytes"),
    ):  # fmt: skip
        speeds = [case.gb_per_s(name) or 0 for case in cases]
        axes.barh([i + offset for i in range(len(cases))], speeds, 0.38, color=color, label=label)
        if name == OURS:
            for i, (speed, case) in enumerate(zip(speeds, cases, strict=True)):
                share = speed / (case.gb_per_s(BOUND) or speed)
                axes.annotate(
                    f"{share:.0%}", (speed, i + offset), xytext=(4, 0), textcoords="offset points", va="center",
                    fontsize=7,
                )  # fmt: skip
    axes.margins(x=0.08)
    axes.set_xlabel("GB/s of the bytes that must move, forward + backward (%: of the copy)")
    _rows(axes, cases)
    axes.figure.legend(fontsize=8, loc="outside lower right", ncols=2)

"""Plots of benchmark results: speed-ups, copy speed, roofline, parts of a step's time, scaling."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_megatron.benchmarking.report.ceilings import Ceilings
from fused_megatron.benchmarking.report.results_file import Results
from fused_megatron.benchmarking.report.tables import is_scaling
from fused_megatron.benchmarking.side_by_side import BOUND, EVEN, FASTER, OURS, SLOWER, Comparison
from fused_megatron.checks import InputError
from fused_megatron.optional_packages import install_command

_COLORS = ("tab:blue", "tab:orange", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "tab:red")
_PARTS = {"compute": "tab:green", "communication": "tab:red", "bubble": "lightgray", "optimizer": "tab:blue"}
_VERDICTS = {FASTER: "tab:green", EVEN: "tab:gray", SLOWER: "tab:red"}
_BOX = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5}
# Difference of the sum of the parts from the median step above which the picture names both.
_DIFFERS = 0.03
_FEW_PROVIDERS = 3
_MARKERS = "osD^vP*Xdh<>pHx+1234"


def plot_results(results: Results, folder: Path) -> list[Path]:
    """Write <theme>_speed_up.png, _copy_speed, _roofline, _breakdown and _scaling, if there are figures for them.

    Raises:
        InputError: matplotlib is missing, or the folder cannot be written.
    """
    try:
        from matplotlib import rc_context  # noqa: PLC0415 - an extra, and slow to import
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise InputError(f"plots need matplotlib: {install_command('matplotlib')}") from None
    cases = [one for one in results.comparisons if one.seconds.get(OURS)]
    ceilings = Ceilings(results.ceilings)
    roofed = [c for c in cases if c.tokens is None and ceilings.roof_gflop_per_s(c)]
    copied = [c for c in cases if c.gb_per_s() and c.over_bound()]
    drawings: list[tuple[str, Any, Sequence[Comparison]]] = [
        ("speed_up", _speed_up, [c for c in cases if c.best_other()]),
        ("copy_speed", _copy_speed, copied),
        ("roofline", lambda axes, some: _roofline(axes, some, ceilings), roofed),
        ("breakdown", _breakdown, [c for c in results.comparisons if c.breakdown]),
        ("scaling", _scaling, [c for c in cases if c.tokens] if is_scaling(results) else []),
    ]
    written = []
    for name, draw, some in drawings:
        if not some:
            continue
        path = folder / f"{results.theme}_{name}.png"
        # Dollar signs in names are plain text, not formulas.
        with rc_context({"text.parse_math": False}):
            figure = Figure(figsize=(8.5, 5), layout="constrained")
            axes = figure.subplots()
            draw(axes, some)
            figure.suptitle(f"{results.theme}, {results.hardware}, {results.date}", fontsize=10)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=120)
            except OSError as error:
                raise InputError(f"plots={folder}: {error.strerror or error}") from None
            except ValueError:  # more pixels than a PNG may have
                raise InputError(f"plots={folder}: {len(some)} cases are too many for {path.name}") from None
        written.append(path)
    return written


def _rows(axes: Any, names: Sequence[str], bars_of_each: Sequence[int]) -> list[list[float]]:
    """Lay out a row for each name, from top to bottom, high enough for its bars; return the y of every bar."""
    rows: list[list[float]] = []
    bottom = 0.0
    for count in bars_of_each:
        rows.append([bottom + i for i in range(count)])
        bottom += count + 0.7
    axes.figure.set_size_inches(8.5, 1.5 + 0.18 * bottom)
    axes.set_yticks([sum(ys) / len(ys) for ys in rows], names, fontsize=8)
    axes.set_ylim(bottom - 0.7 - 0.2, -0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return rows


def _annotate(axes: Any, text: str, x: float, y: float) -> None:
    axes.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7, bbox=_BOX)


def _names(cases: Sequence[Comparison]) -> list[str]:
    """Return the names of the cases, with the dtype if there are several."""
    several = len({c.dtype for c in cases}) > 1
    return [c.name if several else f"{c.op} {c.label}" for c in cases]


def _legend(axes: Any) -> None:
    # Below the axis and its label, with the number of columns that fits.
    handles, labels = axes.get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    axes.figure.legend(
        found.values(), found.keys(), fontsize=8, loc="outside lower center", ncols=max(1, 110 // max(map(len, found)))
    )


def _speed_up(axes: Any, cases: Sequence[Comparison]) -> None:
    """Draw speed-ups. Few providers have a colour each; of many, the colour is the verdict and the bar has the name."""
    others = [[name for name in c.seconds if name not in (OURS, BOUND) and c.ratio(name)] for c in cases]
    every = list(dict.fromkeys(name for some in others for name in some))
    few = len(every) <= _FEW_PROVIDERS
    rows = _rows(axes, _names(cases), [len(some) for some in others])
    for case, some, ys in zip(cases, others, rows, strict=True):
        for name, y in zip(some, ys, strict=True):
            ratio, verdict = case.ratio(name), case.verdict(name)
            if ratio is None or verdict is None:
                continue
            color = _COLORS[every.index(name)] if few else _VERDICTS[verdict]
            label = f"{name}'s time / ours" if few else f"ours is {verdict.lower()}"
            axes.barh(y, ratio.median, 0.85, color=color, label=label, alpha=0.85)
            spread = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
            axes.errorbar(ratio.median, y, xerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
            parts = [f"{ratio.median:.2f}x"] + ([EVEN] if verdict == EVEN else []) + ([] if few else [name])
            _annotate(axes, " ".join(parts), ratio.high, y)
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.16 if few else 0.45)
    axes.set_xlabel("how many times faster ours is\n(bar: median of the rounds; line: 20th to 80th percentile)")
    _legend(axes)


def _copy_speed(axes: Any, cases: Sequence[Comparison]) -> None:
    """Draw the GB/s of the bytes that must move, of ours and of a copy of the same bytes."""
    rows = _rows(axes, _names(cases), [2] * len(cases))
    for which, (name, color, label) in enumerate(
        ((OURS, "tab:green", "ours"), (BOUND, "lightgray", "a copy of the same bytes"))
    ):
        speeds = [case.gb_per_s(name) or 0 for case in cases]
        axes.barh([ys[which] for ys in rows], speeds, 0.85, color=color, label=label)
        if name == OURS:
            for ys, speed, case in zip(rows, speeds, cases, strict=True):
                _annotate(axes, f"{speed / (case.gb_per_s(BOUND) or speed):.0%}", speed, ys[0])
    axes.margins(x=0.08)
    axes.set_xlabel("GB/s of the bytes that must move, forward + backward\n(%: of the copy)")
    _legend(axes)


def _roofline(axes: Any, cases: Sequence[Comparison], ceilings: Ceilings) -> None:
    """Draw GFLOP/s over arithmetic intensity, with the limits by a copy (slope) and by matrix products (lines)."""
    axes.figure.set_size_inches(8.5, 6)
    intensities = [c.intensity() or 1.0 for c in cases]
    dtypes = list(dict.fromkeys(c.dtype for c in cases))
    copy = ceilings.copy_gb_per_s or 1.0
    roofs = {dtype: ceilings.gemm_gflop_per_s(dtype) or 1.0 for dtype in dtypes}
    left, right = min(intensities) / 2, max(*intensities, max(roofs.values()) / copy) * 3
    top = max(roofs.values())
    axes.plot([left, top / copy], [left * copy, top], color="black", label=f"copy: {copy:.1f} GB/s")
    colors = {dtype: _COLORS[i % len(_COLORS)] for i, dtype in enumerate(dtypes)}
    for dtype, roof in roofs.items():
        style = {"color": colors[dtype], "linestyle": "--", "label": f"matrix product, {dtype}: {roof:.0f} GFLOP/s"}
        axes.plot([roof / copy, right], [roof, roof], **style)
    ops = list(dict.fromkeys(f"{c.op} {c.label}" for c in cases))
    for case, intensity in zip(cases, intensities, strict=True):
        marker = _MARKERS[ops.index(f"{case.op} {case.label}") % len(_MARKERS)]
        axes.plot(intensity, case.gflop_per_s(), marker, color=colors[case.dtype], markersize=7, alpha=0.8)
    for i, op in enumerate(ops):
        axes.plot([], [], _MARKERS[i % len(_MARKERS)], color="gray", label=op)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(which="both", alpha=0.2)
    axes.set_xlabel("FLOPs a byte that must move, forward + backward")
    axes.set_ylabel("GFLOP/s of ours")
    _legend(axes)


def _breakdown(axes: Any, cases: Sequence[Comparison]) -> None:
    """Draw the parts of each provider's step time."""
    parts = list(dict.fromkeys(part for case in cases for known in case.breakdown.values() for part in known))
    others = iter(_COLORS[1:])
    colors = {part: _PARTS[part] if part in _PARTS else next(others, "gray") for part in parts}
    rows = _rows(axes, _names(cases), [len(case.breakdown) for case in cases])
    for case, ys in zip(cases, rows, strict=True):
        for (name, known), y in zip(case.breakdown.items(), ys, strict=True):
            left = 0.0
            for part, seconds in known.items():
                axes.barh(y, 1e3 * seconds, 0.9, left=left, color=colors[part], label=part)
                left += 1e3 * seconds
            step = case.ms(name)
            # The speed-ups come from the median step; a picture that shows another time must say so.
            text = f"{left:.0f} {name}"
            if step is not None and abs(left - step.median) > _DIFFERS * step.median:
                text += f" (median step: {step.median:.0f})"
            _annotate(axes, text, left, y)
    axes.margins(x=0.45)
    axes.set_xlabel("milliseconds of a step, of steps measured apart\n(communication: exposed, nothing ran beside it)")
    _legend(axes)


def _scaling(axes: Any, cases: Sequence[Comparison]) -> None:
    """Draw weak scaling: the speed of a rank over its speed in the smallest case, and the ideal."""
    known = sorted(cases, key=lambda c: c.ranks)
    sizes = sorted({c.ranks for c in known})
    shares = [c.efficiency(known[0]) or 0 for c in known]
    first = [next(share for c, share in zip(known, shares, strict=True) if c.ranks == n) for n in sizes]
    axes.plot(sizes, first, color="tab:green")
    axes.plot([c.ranks for c in known], shares, "o", color="tab:green", label="ours")
    axes.plot(sizes, [1] * len(sizes), "--", color="black", label="ideal: as much a rank as in the smallest case")
    for case, share in zip(known, shares, strict=True):
        text = f"{case.op} {case.label}\n{share:.0%}, {(case.tokens_per_s() or 0) / case.ranks:,.0f} tokens/s a rank"
        below = share in first
        axes.annotate(
            text,
            (case.ranks, share),
            xytext=(0, -8 if below else 8),
            textcoords="offset points",
            fontsize=7,
            ha="center",
            va="top" if below else "bottom",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.margins(x=0.18)
    axes.set_ylim(0, 1.15 * max(1, *shares))
    axes.set_xlabel("ranks")
    axes.set_ylabel("speed of a rank over its speed in the smallest case")
    axes.grid(alpha=0.3)
    _legend(axes)

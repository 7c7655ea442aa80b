"""Comparisons as lines and Markdown tables that can be pasted into a README."""

from collections.abc import Iterable, Mapping, Sequence

from fused_megatron.testing.call_overhead import CallOverhead
from fused_megatron.testing.side_by_side import BOUND, COMPILE, EAGER, OURS, Comparison, Spread

Row = Sequence[str]


def one_line(comparison: Comparison) -> str:
    """What was measured of one case, as progress."""
    ms = comparison.ms(OURS)
    if ms is None:
        return f"{comparison.name}: not timed, {comparison.faults.get(OURS, 'no figure')}"
    parts = [f"{comparison.name}: {_ms(ms)} ms"]
    for name in comparison.seconds:
        ratio = comparison.ratio(name)
        if name not in (OURS, BOUND) and ratio is not None:
            parts.append(f"{name} {_times(ratio)}")
    bound = comparison.over_bound()
    parts += [] if bound is None else [f"bound {_times(bound)}"]
    missed = [bar for bar, _, met in comparison.verdicts() if not met]
    return "; ".join(parts) + (f"; MISSED: {', '.join(missed)}" if missed else "")


def remarks(comparisons: Iterable[Comparison]) -> list[str]:
    """One line for each provider that has no figure, or one with a remark; those alike for every case are said once."""
    found: dict[tuple[str, str], list[str]] = {}
    for comparison in comparisons:
        for provider, text in (*comparison.faults.items(), *comparison.notes.items()):
            found.setdefault((provider, text), []).append(comparison.name)
    return [
        f"{provider}: {text} [{names[0] if len(names) == 1 else f'{len(names)} cases'}]"
        for (provider, text), names in found.items()
    ]


def speed_table(comparisons: Sequence[Comparison]) -> list[str]:
    """Ratios with their spread, and the bars: met, or MISSED."""
    header = ["op", "dtype", "ms", "x eager", "x compile", "over bound", "bars"]
    return markdown(header, [_speed_row(c) for c in comparisons])


def _speed_row(comparison: Comparison) -> Row:
    ms, bound = comparison.ms(OURS), comparison.over_bound()
    bars = [f"{bar} {'met' if met else f'MISSED ({figure:g})'}" for bar, figure, met in comparison.verdicts()]
    return [
        f"{comparison.op} {comparison.label}",
        comparison.dtype,
        _ms(ms) if ms else comparison.faults.get(OURS, "-").partition(":")[0],
        *(_times(ratio) if (ratio := comparison.ratio(name)) else "-" for name in (EAGER, COMPILE)),
        _times(bound) if bound else "-",
        "; ".join(bars) or "-",
    ]


def milliseconds_table(comparisons: Sequence[Comparison], default_malloc: bool) -> list[str]:
    """Every provider's median; beside them, where measured, those with the default settings of malloc."""
    names = [OURS, EAGER, COMPILE]
    header = ["op", "dtype", *names, BOUND, "bound GB/s"]
    header += [f"{name}, default malloc" for name in names] if default_malloc else []
    rows = []
    for c in comparisons:
        gb_per_s = c.gb_per_s(BOUND)
        row = [f"{c.op} {c.label}", c.dtype, *(_median(c.ms(name)) for name in (*names, BOUND))]
        row.append(f"{gb_per_s:.1f}" if gb_per_s else "-")
        if default_malloc:
            row += [_number(c.default_malloc_ms[name]) if name in c.default_malloc_ms else "-" for name in names]
        rows.append(row)
    return markdown(header, rows)


def memory_table(comparisons: Sequence[Comparison]) -> list[str]:
    """What fusing saves, ours and then the unfused function's: the same on every machine."""
    rows = []
    for c in comparisons:
        both = c.traffic.get(OURS), c.traffic.get(EAGER)
        moved = [None if t is None else t.moved_bytes for t in both]
        saved = [None if t is None else t.saved_bytes for t in both]
        peak = [c.peak_bytes.get(name) for name in (OURS, EAGER)]
        rows.append([f"{c.op} {c.label}", c.dtype, *(_megabytes(pair) for pair in (moved, saved, peak))])
    return markdown(["op", "dtype", "MB moved, unfused", "MB kept for backward, unfused", "peak MB, unfused"], rows)


def _megabytes(pair: Sequence[int | None]) -> str:
    ours, eager = pair
    return "-" if ours is None or eager is None else f"{ours / 1e6:.1f}, {eager / 1e6:.1f}"


def gpu_table(comparisons: Sequence[Comparison], ceiling_gb_per_s: float) -> list[str]:
    """A row a provider: percentiles, GB/s, share of the measured copy, peak memory, ours against it."""
    header = ["op", "dtype", "provider", "ms 20/50/80 %", "GB/s", "% of copy", "peak MB", "ours is faster"]
    rows = []
    for c in comparisons:
        for name in c.seconds:
            ms, gb_per_s, ratio, peak = c.ms(name), c.gb_per_s(name), c.ratio(name), c.peak_bytes.get(name)
            rows.append(
                [
                    f"{c.op} {c.label}",
                    c.dtype,
                    name,
                    f"{_number(ms.low)} / {_number(ms.median)} / {_number(ms.high)}" if ms else "-",
                    f"{gb_per_s:.0f}" if gb_per_s else "-",
                    f"{100 * gb_per_s / ceiling_gb_per_s:.0f}" if gb_per_s else "-",
                    f"{peak / 1e6:.1f}" if peak is not None else "-",
                    _times(ratio) if ratio and name not in (OURS, BOUND) else "-",
                ]
            )
    return markdown(header, rows)


def overhead_table(overheads: Mapping[str, tuple[CallOverhead, float]]) -> list[str]:
    """Python's share of a forward call on tiny tensors: (measured, bar in microseconds) by op."""
    rows = []
    for name, (result, bar) in overheads.items():
        call, library = min(result.call_us), min(result.library_us)
        verdict = "met" if result.overhead_us <= bar else "MISSED"
        rows.append([name, f"{call:.1f}", f"{library:.1f}", f"{result.overhead_us:.1f}", f"<= {bar:g} us {verdict}"])
    return markdown(["op", "us a call", "library op alone", "Python", "bar"], rows)


def markdown(header: Row, rows: Iterable[Row]) -> list[str]:
    """The lines of a table, its columns padded so that it reads well as plain text too."""
    rows = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return lines


def _times(spread: Spread) -> str:
    return f"{spread.median:.2f}x [{spread.low:.2f}-{spread.high:.2f}]"


def _ms(spread: Spread) -> str:
    return f"{_number(spread.median)} [{_number(spread.low)}-{_number(spread.high)}]"


def _median(spread: Spread | None) -> str:
    return _number(spread.median) if spread else "-"


def _number(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

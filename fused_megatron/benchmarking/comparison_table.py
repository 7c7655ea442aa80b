"""Markdown tables and one-line summaries of benchmark comparisons."""

from collections.abc import Iterable, Mapping, Sequence

from fused_megatron.benchmarking.call_overhead import CallOverhead
from fused_megatron.benchmarking.report.ceilings import Ceilings
from fused_megatron.benchmarking.side_by_side import BOUND, COMPILE, EAGER, EVEN, MET, MISSED, OURS, Comparison, Spread

Row = Sequence[str]


def one_line(comparison: Comparison, *, verdicts: bool = True) -> str:
    """Summarise the measurements of one case, as a progress line.

    Args:
        comparison: the case.
        verdicts: False for a smoke run, whose few rounds on tiny sizes say nothing about what is faster.
    """
    ms = comparison.ms(OURS)
    if ms is None:
        return f"{comparison.name}: not timed, {comparison.faults.get(OURS, 'no figure')}"
    parts = [f"{comparison.name}: {_ms(ms)} ms"]
    others = [name for name in comparison.seconds if name not in (OURS, BOUND)]
    parts += [f"{name} {ratio_of(comparison, name, verdicts=verdicts)}" for name in others]
    bound = comparison.over_bound()
    parts += [] if bound is None else [f"bound {_times(bound)}"]
    missed = [bar for bar, _, verdict in comparison.verdicts() if verdict == MISSED and verdicts]
    return "; ".join(parts) + (f"; MISSED: {', '.join(missed)}" if missed else "")


def remarks(comparisons: Iterable[Comparison]) -> list[str]:
    """Return a line for each provider without a figure or with a remark; equal remarks of several cases are merged."""
    found: dict[tuple[str, str], list[str]] = {}
    for comparison in comparisons:
        for provider, text in (*comparison.faults.items(), *comparison.notes.items()):
            found.setdefault((provider, text), []).append(comparison.name)
    return [
        f"{provider}: {text} [{names[0] if len(names) == 1 else f'{len(names)} cases'}]"
        for (provider, text), names in found.items()
    ]


def speed_table(comparisons: Sequence[Comparison], *, verdicts: bool = True) -> list[str]:
    """Tabulate the ratios with their spread, and the bars (performance targets): met, MISSED or even.

    Args:
        comparisons: the cases.
        verdicts: as in one_line; without them there are no bars.
    """
    header = ["op", "dtype", "ms", "x eager", "x compile", "over bound", "bars"]
    rows = [_speed_row(c, verdicts) for c in comparisons]
    return markdown(header if verdicts else header[:-1], rows if verdicts else [row[:-1] for row in rows])


def _speed_row(comparison: Comparison, verdicts: bool) -> Row:
    ms, bound = comparison.ms(OURS), comparison.over_bound()
    return [
        f"{comparison.op} {comparison.label}",
        comparison.dtype,
        _ms(ms) if ms else comparison.faults.get(OURS, "-").partition(":")[0],
        ratio_of(comparison, EAGER, verdicts=verdicts),
        ratio_of(comparison, COMPILE, verdicts=verdicts),
        _times(bound) if bound else "-",
        "; ".join(bar_verdicts(comparison)) or "-",
    ]


def bar_verdicts(comparison: Comparison) -> list[str]:
    """Return the verdict on each bar (target): "eager >= 2x met", "bound <= 1.5x MISSED (1.8)"."""
    return [
        f"{bar} {verdict}" + ("" if verdict == MET else f" ({figure:g})")
        for bar, figure, verdict in comparison.verdicts()
    ]


def ratio_of(comparison: Comparison, provider: str, *, verdicts: bool = True) -> str:
    """Format how many times faster ours is than the provider, with the spread, and "even" if so; "-" if unknown."""
    ratio = comparison.ratio(provider)
    if ratio is None:
        return "-"
    return _times(ratio) + (" even" if verdicts and comparison.verdict(provider) == EVEN else "")


def limits_table(comparisons: Sequence[Comparison], ceilings: Ceilings) -> list[str]:
    """Tabulate our speed beside the machine's limits: GB/s, GFLOP/s, and the share of the roofline."""
    rows = []
    for c in comparisons:
        gb_per_s, gflop_per_s = c.gb_per_s(), c.gflop_per_s()
        roof, share = ceilings.roof_gflop_per_s(c), ceilings.share_of_roof(c)
        rows.append(
            [
                f"{c.op} {c.label}",
                c.dtype,
                f"{gb_per_s:.1f}" if gb_per_s else "-",
                _rate(gflop_per_s),
                f"{c.intensity():.2f}" if c.intensity() else "-",
                "-" if roof is None else f"{ceilings.limit(c)}, {roof:.1f}",
                "-" if share is None else f"{share:.0%}",
            ]
        )
    return markdown(["op", "dtype", "GB/s", "GFLOP/s", "FLOP per byte", "roof GFLOP/s", "% of roof"], rows)


def phases_table(comparisons: Sequence[Comparison]) -> list[str]:
    """Tabulate the median milliseconds of each provider, forward and backward apart."""
    names = _providers(comparisons)
    rows = []
    for c in comparisons:
        phases = [c.phases_ms(name) for name in names]
        cells = [" + ".join(_number(one.median) for one in pair) if pair else "-" for pair in phases]
        rows.append([f"{c.op} {c.label}", c.dtype, *cells])
    return markdown(["op", "dtype", *names], rows)


def _providers(comparisons: Sequence[Comparison]) -> list[str]:
    """List the providers in the order of measurement, without the bound."""
    return list(dict.fromkeys(name for c in comparisons for name in c.seconds if name != BOUND))


def milliseconds_table(comparisons: Sequence[Comparison], default_malloc: bool) -> list[str]:
    """Tabulate every provider's median time, and its median with the default settings of malloc if measured."""
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
    """Tabulate bytes moved, bytes kept and peak memory, ours and the unfused function's; the same on every machine."""
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


def provider_table(comparisons: Sequence[Comparison], ceilings: Ceilings) -> list[str]:
    """Tabulate a row for each provider; columns without any figure are left out."""
    header = ["case", "dtype", "provider", "tokens/s", "ms [20-80 %]", "ours is faster", "GB/s", "GFLOP/s a rank"]
    header += ["% of roof", "MFU", "HFU", "peak MB"]
    rows = [_provider_row(c, name, ceilings) for c in comparisons for name in c.seconds]
    known = [i for i in range(len(header)) if i < 3 or any(row[i] != "-" for row in rows)]
    return markdown([header[i] for i in known], [[row[i] for i in known] for row in rows])


def _provider_row(c: Comparison, name: str, ceilings: Ceilings) -> Row:
    ms, tokens_per_s, peak = c.ms(name), c.tokens_per_s(name), c.peak_bytes.get(name)
    gb_per_s = c.gb_per_s(name)
    gflop_per_s = c.gflop_per_s(name) if name != BOUND else None
    step = c.tokens is not None
    shares = [ceilings.share_of_gemm(c, name, flops) if step else None for flops in (c.model_flops, c.hardware_flops)]
    roof = None if step else ceilings.share_of_roof(c, name)
    best = " best other" if name == c.best_other() and len(c.seconds) > 2 else ""
    return [
        f"{c.op} {c.label}",
        c.dtype,
        name,
        f"{tokens_per_s:,.0f}" if tokens_per_s else "-",
        _ms(ms) if ms else "-",
        "-" if name in (OURS, BOUND) else ratio_of(c, name) + best,
        f"{gb_per_s:.0f}" if gb_per_s else "-",
        _rate(gflop_per_s),
        f"{roof:.0%}" if roof is not None else "-",
        *(f"{share:.1%}" if share is not None else "-" for share in shares),
        f"{peak / 1e6:.1f}" if peak is not None else "-",
    ]


def breakdown_table(comparisons: Sequence[Comparison]) -> list[str]:
    """Tabulate the parts of each provider's step time: milliseconds, and share of the sum; and the whole step.

    The parts come from a few more steps, which are measured apart. The last column is the median of the timed steps,
    from which the speed-ups come; on a machine with other load the two differ.
    """
    parts = list(dict.fromkeys(part for c in comparisons for one in c.breakdown.values() for part in one))
    rows = []
    for c in comparisons:
        for name, known in c.breakdown.items():
            whole = sum(known.values())
            shares = {part: seconds / whole if whole else 0.0 for part, seconds in known.items()}
            cells = [f"{_number(1e3 * known[p])} ({shares[p]:.0%})" if p in known else "-" for p in parts]
            step = c.ms(name)
            rows.append([f"{c.op} {c.label}", c.dtype, name, *cells, _number(1e3 * whole), _median(step)])
    return markdown(["case", "dtype", "provider", *(f"{part} ms" for part in parts), "sum ms", "step ms"], rows)


def scaling_table(comparisons: Sequence[Comparison]) -> list[str]:
    """Tabulate weak scaling: the work of a rank, compared with a rank's work in the smallest case."""
    known = sorted((c for c in comparisons if c.seconds.get(OURS)), key=lambda c: c.ranks)
    rows = []
    for c in known:
        tokens_per_s, rate = c.tokens_per_s(OURS), c.gflop_per_s()
        efficiency = c.efficiency(known[0])
        rows.append(
            [
                f"{c.op} {c.label}",
                str(c.ranks),
                f"{tokens_per_s:,.0f}" if tokens_per_s else "-",
                f"{tokens_per_s / c.ranks:,.0f}" if tokens_per_s else "-",
                _rate(rate),
                f"{efficiency:.0%}" if efficiency is not None else "-",
            ]
        )
    return markdown(["case", "ranks", "tokens/s", "tokens/s a rank", "GFLOP/s a rank", "efficiency (ideal 100%)"], rows)


def overhead_table(overheads: Mapping[str, tuple[CallOverhead, float]], *, verdicts: bool = True) -> list[str]:
    """Tabulate the Python overhead of a forward call on tiny tensors.

    Args:
        overheads: (measurement, largest allowed overhead in microseconds) by op.
        verdicts: as in one_line.
    """
    rows = []
    for name, (result, bar) in overheads.items():
        call, library = min(result.call_us), min(result.library_us)
        verdict = f" {MET if result.overhead_us <= bar else MISSED}" if verdicts else ""
        rows.append([name, f"{call:.1f}", f"{library:.1f}", f"{result.overhead_us:.1f}", f"<= {bar:g} us{verdict}"])
    return markdown(["op", "us a call", "library op only", "Python", "bar"], rows)


def markdown(header: Row, rows: Iterable[Row]) -> list[str]:
    """Return the lines of a Markdown table, with padded columns so that it also reads well as plain text."""
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


def _rate(value: float | None) -> str:
    return "-" if not value else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _number(value: float) -> str:
    """Format with three digits and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

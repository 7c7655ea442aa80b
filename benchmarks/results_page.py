"""Tables of docs/results.md and docs/schedules.md, from the files that benchmarks wrote into benchmarks/results.

python benchmarks/results_page.py [--write]

Nothing is measured here. `make bench-models` writes its own table of the page.
"""

import argparse
from pathlib import Path

from fused_megatron.benchmarking.comparison_table import bar_verdicts, ratio_of, speed_table
from fused_megatron.benchmarking.report.page_tables import write_tables
from fused_megatron.benchmarking.report.results_file import Results, read_results
from fused_megatron.benchmarking.side_by_side import BOUND, OURS, Comparison

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
SCHEDULES = ROOT / "docs" / "schedules.md"
RESULTS = ROOT / "benchmarks" / "results"
LIMITS = ROOT / "docs" / "results" / "limit_of_a_step.json"
"""The page has the options of its run."""
THEMES = {"end_to_end": "training steps", "layers": "layers", "ops": "ops"}
"""Themes of results files, and the names of the marks in docs/results.md."""


def tables() -> dict[Path, dict[str, str]]:
    """Return the tables of the pages by the names of their marks."""
    found = {}
    for theme, name in THEMES.items():
        (path,) = RESULTS.glob(f"{theme}_*.json")
        results = read_results(path)
        rows = speed_table(results.comparisons) if theme == "ops" else _beside_others(results.comparisons)
        source = ["", _source(results, path)]
        found[name] = "\n".join([*map(_narrow, rows), *source])
        if theme == "end_to_end":
            pipelines = "\n".join([*_beside_torch_pipelining(results.comparisons), *source])
    limits = read_results(LIMITS)
    cases = [case for case in limits.comparisons if case.over_bound() is not None]
    found["limit of a step"] = "\n".join([*_beside_limits(cases), "", _source(limits, LIMITS)])
    return {PAGE: found, SCHEDULES: {"torch pipelining": pipelines}}


def _source(results: Results, path: Path) -> str:
    torch = results.settings["torch"].partition("+")[0]
    return f"`{path.relative_to(ROOT)}`: {results.hardware}, {results.date}, torch {torch}."


def _beside_others(cases: list[Comparison]) -> list[str]:
    """Tabulate the time of each case, how many times faster it is than each other provider, and its memory."""
    lines = [
        "| case | ms | tokens/s | times faster than [20-80 %] | bar | peak MB: ours, best other |",
        "|---" * 6 + "|",
    ]
    for case in cases:
        ms, best = case.ms(OURS), case.best_other()
        assert ms is not None and best is not None, f"{case.name} was not timed"
        others = "; ".join(f"{name} {ratio_of(case, name)}" for name in case.seconds if name not in (OURS, BOUND))
        bars = "; ".join(bar_verdicts(case)) or "-"
        peaks = ", ".join(f"{case.peak_bytes[name] / 1e6:.0f}" for name in (OURS, best))
        name = f"{case.op} {case.label}".replace(" forward + backward", "")
        lines.append(f"| {name} | {ms.median:.0f} | {case.tokens_per_s():,.0f} | {others} | {bars} | {peaks} |")
    return lines


def _beside_limits(cases: list[Comparison]) -> list[str]:
    """Tabulate the time of steps over their limit, and the part of products and attention alone."""
    lines = ["| case | ms | over the limit [20-80 %] | bar | products and attention alone |", "|---" * 5 + "|"]
    for case in cases:
        ms, over = case.ms(OURS), case.over_bound()
        assert ms is not None and over is not None, f"{case.name} was not timed"
        bars = "; ".join(bar_verdicts(case)) or "-"
        (alone,) = (case.ratio(name) for name in case.seconds if name not in (OURS, BOUND))
        share = "-" if alone is None else f"{alone.median:.2f} of a step"
        spread = f"{over.median:.2f}x [{over.low:.2f}-{over.high:.2f}]"
        name = f"{case.op} {case.label}".partition(", against")[0]
        lines.append(f"| {name} | {ms.median:.0f} | {spread} | {bars} | {share} |")
    return lines


def _beside_torch_pipelining(cases: list[Comparison]) -> list[str]:
    """Tabulate the pipeline schedules beside torch's engine with the same cut of blocks, and with another."""
    header = ["schedule", "blocks", "x torch, same cut", "x torch, another cut"]
    lines = [f"| {' | '.join(header)} | peak MB: ours, torch's same cut, the other |", "|---" * 5 + "|"]
    for case in cases:
        if not case.label.startswith("pp="):
            continue
        names = [OURS, *(name for name in case.seconds if name != OURS)]
        (_, same, other), (_, cut, another) = names, (name.rpartition(" ")[2] for name in names)
        peaks = ", ".join(f"{case.peak_bytes[name] / 1e6:.0f}" for name in names)
        cells = [f"`{case.label.split()[1]}`", cut, ratio_of(case, same), f"{ratio_of(case, other)}, {another}", peaks]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _narrow(row: str) -> str:
    """Return a row without the spaces that align its columns."""
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    return "|---" * len(cells) + "|" if set(cells[0]) == {"-"} else f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into the pages")
    write = parser.parse_args().write
    for page, found in tables().items():
        if write:
            write_tables(page, found)
        else:
            print("\n\n".join(found.values()) + "\n")


if __name__ == "__main__":
    main()

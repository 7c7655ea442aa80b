"""Tables of docs/planner.md: errors of predictions against published and measured steps.

python benchmarks/planner_errors.py --write                 # the published tables of benchmarks/published
python benchmarks/planner_errors.py --write --grids DIR     # also the measured grids, which are not in the repository
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fused_megatron.benchmarking.report.page_tables import write_tables
from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.prediction.measured_blocks import with_measured_blocks
from fused_megatron.planning.prediction.published_runs import read_runs
from fused_megatron.planning.prediction.validation import (
    Compared,
    by_fit,
    compare,
    mean_and_p95,
    regrets,
    summary,
)

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/planner.md"
PUBLISHED = {
    "Korthikanti et al. 2022, table 5": ("korthikanti_2205.05198_table5.csv", "a100"),
    "Narayanan et al. 2021, table 1": ("ptdp_2104.04473_table1.csv", "a100"),
    "LLM Foundry, FSDP": ("llm_foundry_a100.csv", "a100"),
    "tutorial, 8 H100": ("tutorial_experiments.csv", "h100"),
}
GRIDS = {
    "vTrain, 1 node of A100": ("a100_single_node_steps.csv", "a100"),
    "vTrain, 8 to 64 nodes of A100": ("a100_multi_node_steps.csv", "a100"),
}
_HEAD = [
    "| source | rows | number | mean, % | median, % | 95 %, % | largest, % | bias, % |",
    "|---|---|--:|--:|--:|--:|--:|--:|",
]


def table(folder: Path, sources: dict[str, tuple[str, str]]) -> str:
    """Return the errors of the sources as a table of Markdown, fitted and other rows apart."""
    lines = list(_HEAD)
    chosen = []
    for title, (file, cluster) in sources.items():
        rows = compare(read_runs(folder / file), load_cluster(cluster))
        for name, members in by_fit(rows).items():
            if errors := summary(members):
                sizes = (errors.mean, errors.median, errors.p95, errors.largest)
                cells = [
                    title,
                    name,
                    str(errors.number),
                    *(f"{100 * size:.1f}" for size in sizes),
                    _signed(errors.bias),
                ]
                lines.append(f"| {' | '.join(cells)} |")
        if sources is GRIDS and regrets(rows):
            learned = with_measured_blocks(load_cluster(cluster), [row.run for row in rows if row.fitted])
            measured = compare([row.run for row in rows], learned)
            chosen.append(_regret_line(title, "the constants", rows))
            chosen.append(_regret_line(title, f"and {len(learned.blocks)} measured shapes", measured))
    if chosen:
        lines += [
            "",
            "| source | predicted by | held-out error, % | workloads | fastest chosen "
            "| mean regret, % | 95 %, % | worst, % |",
        ]
        lines += ["|---|---|--:|--:|--:|--:|--:|--:|", *chosen]
    return "\n".join(lines)


def _regret_line(title: str, means: str, rows: Sequence[Compared]) -> str:
    found = regrets(rows)
    sizes = [f"{100 * size:.1f}" for size in (*mean_and_p95(found), max(found))]
    held_out = summary([row for row in rows if not row.fitted])
    error = "-" if held_out is None else f"{100 * held_out.mean:.1f}"
    cells = [title, means, error, str(len(found)), str(sum(regret == 0 for regret in found)), *sizes]
    return f"| {' | '.join(cells)} |"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-0.0", "+0.0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--grids", type=Path, help="folder of the measured grids")
    arguments = parser.parse_args()
    tables = {"errors": table(ROOT / "benchmarks/published", PUBLISHED)}
    if arguments.grids is not None:
        tables["grids"] = table(arguments.grids, GRIDS)
    print("\n\n".join(tables.values()))
    if arguments.write:
        write_tables(PAGE, tables)


if __name__ == "__main__":
    main()

"""Tables of docs/planner.md: errors of predictions against published and measured steps.

python benchmarks/planner_errors.py --write                 # the published tables of benchmarks/published
python benchmarks/planner_errors.py --write --grids DIR     # also the measured grids, which are not in the repository
"""

import argparse
import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from fused_megatron.benchmarking.report.page_tables import write_tables
from fused_megatron.planning.prediction.cluster import load_cluster
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
            chosen.append(_regret_line(title, "as predicted", rows))
            chosen.append(_regret_line(title, "shapes corrected", with_shapes_corrected(rows)))
    if chosen:
        lines += ["", "| source | times | workloads | fastest chosen | mean regret, % | 95 %, % | largest, % |"]
        lines += ["|---|---|--:|--:|--:|--:|--:|", *chosen]
    return "\n".join(lines)


def _regret_line(title: str, times: str, rows: Sequence[Compared]) -> str:
    found = regrets(rows)
    sizes = [f"{100 * size:.1f}" for size in (*mean_and_p95(found), max(found))]
    cells = [title, times, str(len(found)), str(sum(regret == 0 for regret in found)), *sizes]
    return f"| {' | '.join(cells)} |"


def with_shapes_corrected(rows: Sequence[Compared]) -> list[Compared]:
    """Return rows whose predictions are multiplied by the median error of the fitted rows with the same block shape.

    A shape is a hidden size, a tensor-parallel size and a microbatch: what a table of measured blocks would know.
    """
    ratios = defaultdict(list)
    for row in rows:
        if row.fitted:
            ratios[_shape(row)].append(1 / (1 + row.error))
    return [_scaled(row, statistics.median(ratios[_shape(row)] or [1.0])) for row in rows]


def _shape(row: Compared) -> tuple[int, int, int]:
    config = row.run.config
    return config.model.hidden_size, config.parallel.tensor_parallel_size, config.training.microbatch_size


def _scaled(row: Compared, factor: float) -> Compared:
    prediction = dataclasses.replace(row.prediction, seconds=factor * row.prediction.seconds)
    return dataclasses.replace(row, prediction=prediction)


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

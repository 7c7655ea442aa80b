"""Fit of the constants of a shipped cluster to published and measured steps; it writes the cluster's file.

    python benchmarks/fit_cluster.py a100-80gb --data DIR
    python benchmarks/fit_cluster.py h100-80gb --data DIR

DIR holds the CSV files of SOURCES. A part of the rows is fitted; the file names them by digest, so that
`fused-megatron predict --validate FILE.csv` reports the others apart. Constants of a data sheet, of the measured
collectives of a node and of memory are not fitted: they stay as the file has them.
"""

import argparse
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from fused_megatron.planning.prediction.calibration import Observation, fit
from fused_megatron.planning.prediction.cluster import SHIPPED, Cluster, Fitted, cluster_text, load_cluster
from fused_megatron.planning.prediction.fitted_runs import values_of
from fused_megatron.planning.prediction.published_runs import PublishedRun, read_runs
from fused_megatron.planning.prediction.step_time import predict_step

CONSTANTS = {
    "a100-80gb": (
        "product_efficiency",
        "product_us",
        "attention_efficiency",
        "launch_us",
        "network_gb_per_s",
        "transfer_overlap",
        "step_ms",
    ),
    "h100-80gb": ("product_efficiency", "product_us", "launch_us", "node_gb_per_s", "step_ms"),
}
"""Constants that are fitted."""
SOURCES = {
    "a100-80gb": (
        ("a100_single_node_steps.csv", 0.2, 1.5),
        ("a100_multi_node_steps.csv", 0.25, 2.0),
        ("llm_foundry_a100.csv", 0.25, 0.8),
    ),
    "h100-80gb": (("tutorial_experiments.csv", 0.3, 1.0),),
}
"""Files with the share of their rows that is fitted, and the weight of a row."""
_SEED = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cluster", choices=list(CONSTANTS))
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    name = arguments.cluster
    cluster = load_cluster(name)
    fitted: list[PublishedRun] = []
    others: list[PublishedRun] = []
    observations = []
    for file, share, weight in SOURCES[name]:
        runs = read_runs(arguments.data / file)
        chosen = set(random.Random(_SEED).sample(range(len(runs)), round(share * len(runs))))
        fitted += (mine := [run for index, run in enumerate(runs) if index in chosen])
        others += [run for index, run in enumerate(runs) if index not in chosen]
        observations += [_observation(run, weight) for run in mine]
    cluster = fit(cluster, observations, CONSTANTS[name])
    cluster = _rounded(cluster, CONSTANTS[name])
    errors = sorted(abs(_seconds(run, cluster) / run.seconds - 1) for run in others)
    print(f"{len(fitted)} rows fitted; {len(others)} others: mean error {100 * sum(errors) / len(errors):.2f} %")
    cluster = dataclasses.replace(
        cluster,
        fitted=Fitted(
            error_percent=round(100 * errors[round(0.9 * (len(errors) - 1))], 1),
            engines=tuple(sorted({run.engine for run in fitted})),
            rows=tuple(run.digest for run in fitted),
            ranges=_ranges(fitted),
        ),
    )
    path = SHIPPED / f"{name}.toml"
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    path.write_text(head + cluster_text(cluster))
    print(path.read_text())


def _observation(run: PublishedRun, weight: float) -> Observation:
    return Observation(run.engine, run.name, run.seconds, lambda cluster: _seconds(run, cluster), weight)


def _seconds(run: PublishedRun, cluster: Cluster) -> float:
    return predict_step(run.config, cluster, engine=run.engine).seconds


def _rounded(cluster: Cluster, names: Sequence[str]) -> Cluster:
    """Return the cluster with three digits of each fitted constant: more would claim what no fit shows."""
    values = {name: float(f"{getattr(cluster, name):.3g}") for name in names}
    return Cluster(**{**vars(cluster), **values})


def _ranges(runs: Sequence[PublishedRun]) -> dict[str, tuple[float, float]]:
    all_values = [values_of(run.config) for run in runs]
    return {name: (min(v[name] for v in all_values), max(v[name] for v in all_values)) for name in all_values[0]}


if __name__ == "__main__":
    main()

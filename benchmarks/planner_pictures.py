"""Pictures of docs/planner.md: how layouts scale, and how they compare, beside the figures of a paper.

    python benchmarks/planner_pictures.py [--write]

Published figures: Narayanan et al. 2021 (arXiv:2104.04473), table 2, A100 80 GB. --write puts the tables into the page.
"""

import argparse
import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fused_megatron.benchmarking.report.page_tables import write_tables
from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.observe.model_flops import gpt_step_flops
from fused_megatron.planning.engine_memory import device_memory
from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.prediction.step_time import predict_step
from fused_megatron.planning.search.best_layouts import find_best

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/planner.md"
IMAGES = ROOT / "docs/images"
TABLE_2 = ROOT / "benchmarks/published/ptdp_2104.04473_table2_zero3.csv"
CLUSTER = load_cluster("a100")
GPUS = (64, 128, 256, 512, 1024, 2048)
BATCH, SEQ_LEN = 2048, 2048
MODELS = {
    "175B": GPTConfig(num_layers=96, hidden_size=12288, num_heads=96, seq_len=SEQ_LEN, vocab_size=51200),
    "530B": GPTConfig(num_layers=105, hidden_size=20480, num_heads=128, seq_len=SEQ_LEN, vocab_size=51200),
    "100B MoE": GPTConfig(
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        seq_len=SEQ_LEN,
        vocab_size=51200,
        num_experts=32,
        experts_per_token=2,
        expert_ffn_hidden_size=11008,
        activation="swiglu",
        linear_biases=False,
    ),
}
"""The 100B MoE model: 32 experts of width 11,008 in each block, two of them for each token."""
PIPELINE = {"175B": 8, "530B": 35, "100B MoE": 4}
COLOURS = {"3D": "#4477aa", "ZeRO-1": "#66ccee", "hybrid": "#228833", "ZeRO-3": "#ee6677", "planner": "#ccbb44"}


def layout(name: str, gpus: int, kind: str, microbatch: int) -> TrainConfig | None:
    """Return a config of one kind of layout; None if it does not exist for these GPUs."""
    model, pp = MODELS[name], PIPELINE[name]
    ep = 8 if model.num_experts else 1
    sizes = {
        "3D": {"tensor_parallel_size": 8, "pipeline_parallel_size": pp, "zero_stage": 0},
        "ZeRO-1": {"tensor_parallel_size": 8, "pipeline_parallel_size": pp, "zero_stage": 1},
        "hybrid": {"tensor_parallel_size": 8, "zero_stage": 3},
        "ZeRO-3": {"zero_stage": 3},
    }[kind]
    replicas = gpus // (sizes.get("tensor_parallel_size", 1) * sizes.get("pipeline_parallel_size", 1))
    try:
        return TrainConfig(
            model=dataclasses.replace(model, recompute="full" if kind in ("ZeRO-3", "hybrid") else "selective"),
            parallel=ParallelConfig(
                data_parallel_size=replicas,
                sequence_parallel="tensor_parallel_size" in sizes,
                expert_parallel_size=ep,
                **sizes,
            ),
            training=TrainingConfig(dtype="bfloat16", global_batch_size=BATCH, microbatch_size=microbatch),
        )
    except InputError:
        return None


def speed(config: TrainConfig) -> tuple[float, float]:
    """Return the model TFLOP/s of a GPU, and the GB of the fullest GPU."""
    flops, _ = gpt_step_flops(config.model, config.training.global_batch_size * config.model.seq_len)
    seconds = predict_step(config, CLUSTER).seconds
    return flops / seconds / config.parallel.num_ranks / 1e12, device_memory(config, CLUSTER).total / 1e9


def planned(name: str, gpus: int) -> TrainConfig | None:
    """Return the config that the planner chooses; None if the model does not fit."""
    base = TrainConfig(
        model=MODELS[name], training=TrainingConfig(dtype="bfloat16", global_batch_size=BATCH, microbatch_size=1)
    )
    plans = find_best(base, gpus, CLUSTER).plans
    return plans[0].config if plans else None


def published() -> dict[tuple[str, str], dict[int, float]]:
    """Return the published TFLOP/s a GPU by model and scheme, by number of GPUs; recomputation counts in them."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in csv.DictReader(TABLE_2.open()):
        name = "175B" if row["params_B"].startswith("174") else "530B"
        found.setdefault((name, row["scheme"].split()[0]), {})[int(row["gpus"])] = float(row["TFLOPs_per_gpu"])
    return found


def scaling(rows: dict[str, dict[int, float]], path: Path) -> None:
    """Draw TFLOP/s a GPU over GPUs for 175B, with the paper's figures as hollow marks."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for kind, points in rows.items():
        axes.plot(list(points), list(points.values()), "o-", color=COLOURS[kind], label=f"{kind}, predicted")
    for scheme, kind in (("PTD-P", "3D"), ("ZeRO-3", "ZeRO-3")):
        points = {gpus: 0.75 * value for gpus, value in published()["175B", scheme].items()}
        axes.plot(
            list(points), list(points.values()), "s", mfc="none", color=COLOURS[kind], label=f"{scheme}, published"
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
    axes.set_ylim(0)
    axes.set_xlabel(f"A100 GPUs, 175B parameters, {BATCH} sequences a step")
    axes.set_ylabel("model TFLOP/s of a GPU")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def comparison(rows: dict[str, dict[str, float]], gpus: dict[str, int], path: Path) -> None:
    """Draw TFLOP/s a GPU of each kind of layout for each model."""
    figure, axes = plt.subplots(figsize=(6.5, 3.6))
    width = 0.8 / len(COLOURS)
    for index, (kind, colour) in enumerate(COLOURS.items()):
        values = [rows[name].get(kind, 0.0) for name in rows]
        axes.bar([x + index * width for x in range(len(rows))], values, width, color=colour, label=kind)
    axes.set_xticks([x + 0.32 for x in range(len(rows))], [f"{name} on {gpus[name]:,}" for name in rows])
    axes.set_ylabel("model TFLOP/s of a GPU")
    axes.legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.15), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _shown(value: tuple[float, float] | None) -> str:
    if value is None:
        return "none"
    return f"{value[0]:.0f}" if value[1] <= CLUSTER.memory_gb else f"{value[0]:.0f} ({value[1]:.0f} GB: does not fit)"


def _found(name: str, gpus: int, kind: str) -> tuple[float, float] | None:
    """Return the speed and the memory of a kind of layout, with the fastest microbatch that fits if one does."""
    if kind == "planner":
        config = planned(name, gpus)
        return None if config is None else speed(config)
    speeds = []
    for microbatch in (1, 2, 4, 8, 16):
        try:
            config = layout(name, gpus, kind, microbatch)
            speeds += [] if config is None else [speed(config)]
        except InputError:  # the batch does not divide
            continue
    return max(speeds, key=lambda found: (found[1] <= CLUSTER.memory_gb, found[0]), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    by_gpus = {kind: {gpus: _found("175B", gpus, kind) for gpus in GPUS} for kind in COLOURS}
    sizes = {"175B": 1024, "530B": 1120, "100B MoE": 256}
    by_model = {name: {kind: _found(name, gpus, kind) for kind in COLOURS} for name, gpus in sizes.items()}
    tables = {
        "scaling": table(
            ["175B, TFLOP/s a GPU", *(f"{gpus:,}" for gpus in GPUS)],
            [[kind, *(_shown(value) for value in row.values())] for kind, row in by_gpus.items()],
        ),
        "comparison": table(
            ["TFLOP/s a GPU", *COLOURS],
            [[f"{name} on {sizes[name]:,}", *map(_shown, row.values())] for name, row in by_model.items()],
        ),
    }
    print("\n\n".join(tables.values()))
    if not arguments.write:
        return
    fits = {kind: {g: v[0] for g, v in row.items() if v and v[1] <= CLUSTER.memory_gb} for kind, row in by_gpus.items()}
    scaling(fits, IMAGES / "planner_scaling.png")
    bars = {n: {k: v[0] for k, v in row.items() if v and v[1] <= CLUSTER.memory_gb} for n, row in by_model.items()}
    comparison(bars, sizes, IMAGES / "planner_comparison.png")
    write_tables(PAGE, tables)


if __name__ == "__main__":
    main()

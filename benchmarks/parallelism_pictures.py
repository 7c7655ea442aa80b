"""Pictures of parallelism: a block over two tensor-parallel ranks, the cube of ranks, and the groups that send.

    python benchmarks/parallelism_pictures.py [--write FOLDER]

The all-reduces of the first picture are recorded on two gloo ranks, the numbers of the second are of mesh.py, and the
groups of the third are of a dry run. A page of either colour shows the lines.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle

from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.experiments.picture import INK
from fused_megatron.mesh import rank_at
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.planning.dry_run import DryRun
from fused_megatron.testing import run_on_ranks

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SIZES = {"pp": 4, "dp": 2, "tp": 2}
"""Layout of the cube and of the groups, in the order of the mesh."""
COLUMN, ROW, WHOLE, SUM = "#4477aa", "#228833", "#777777", "#dd5566"
GROUP_COLOURS = ("#4477aa", "#cc4455", "#228833", "#997700", "#2288aa", "#aa3377", "#bb5522", "#777777")
MODEL = GPTConfig(num_layers=4, hidden_size=32, num_heads=4, seq_len=16, vocab_size=64)
Ledger = list[tuple[str, str, bool, int]]


def record_block(rank: int, world_size: int) -> Ledger:
    """Return kind, layer, direction (True: backward) and bytes of each transfer of a block on this rank."""
    config = TrainConfig(
        MODEL,
        ParallelConfig(tensor_parallel_size=world_size, data_parallel_size=1, overlap=False),
        training=TrainingConfig(global_batch_size=1, microbatch_size=1),
    )
    stages = build_stages(config, build_mesh(config, "cpu"), plan_pipeline(config), torch.device("cpu"))
    (stage,) = stages.stages.values()
    tokens = torch.zeros(1, MODEL.seq_len, dtype=torch.int64)
    with record_communication() as ledger:
        stage(tokens).sum().backward()
    return [(each.kind, each.layer, each.backward, each.num_bytes) for each in ledger.entries]


def all_reduces_of_a_block(ledger: Ledger) -> dict[bool, int]:
    """Return how many all-reduces a block has in forward (False) and in backward (True)."""
    found = Counter(backward for kind, _, backward, num in ledger if kind == "all_reduce" and num == _activation())
    return {backward: found[backward] // MODEL.num_layers for backward in (False, True)}


def _activation() -> int:
    return 4 * MODEL.seq_len * MODEL.hidden_size


def draw_block(ledger: Ledger, path: Path) -> None:
    """Draw the matrices of a block over two ranks, and its all-reduces."""
    counts = all_reduces_of_a_block(ledger)
    figure, axes = plt.subplots(figsize=(10, 3.8), layout="constrained")
    names = ("norm", "query, key,\nvalue", "attention", "projection", "norm", "up", "GeLU", "down")
    colours = (WHOLE, COLUMN, COLUMN, ROW, WHOLE, COLUMN, COLUMN, ROW)
    for place, (name, colour) in enumerate(zip(names, colours, strict=True)):
        x = 1.5 * place + 0.35 * (place > 3)
        for rank in (0, 1):
            _box(axes, x, 1.6 * (1 - rank), name, colour)
        _arrow(axes, x - 0.35, x)
        if colour == ROW:
            _sum(axes, x + 1.05, "forward" if counts[False] else "")
        if name in ("query, key,\nvalue", "up"):
            _sum(axes, x - 0.22, "backward" if counts[True] else "", dashed=True)
    for rank in (0, 1):
        axes.text(-1.15, 1.6 * (1 - rank) + 0.5, f"rank {rank}", color=INK, fontsize=9, va="center")
    for place, (colour, text) in enumerate(
        (
            (COLUMN, "column: output features, heads"),
            (ROW, "row: input features"),
            (WHOLE, "whole on each rank"),
            (SUM, f"all-reduces of {MODEL.seq_len} x {MODEL.hidden_size} activations"),
        )
    ):
        axes.add_patch(Rectangle((3.1 * place - 0.4, -1.5), 0.3, 0.3, color=colour))
        axes.text(3.1 * place, -1.35, text, color=INK, fontsize=8, va="center")
    axes.set_title(
        f"One block over two ranks, recorded: {counts[False]} all-reduces in forward, {counts[True]} in backward",
        fontsize=10,
        color=INK,
    )
    _save(figure, axes, path, (-1.3, 13), (-1.7, 3.4))


def _box(axes: Any, x: float, y: float, name: str, colour: str) -> None:
    axes.add_patch(Rectangle((x, y), 0.95, 1, facecolor=colour, edgecolor=INK))
    axes.text(x + 0.475, y + 0.5, name, ha="center", va="center", fontsize=7.5, color="white", weight="bold")


def _arrow(axes: Any, left: float, right: float) -> None:
    for y in (0.5, 2.1):
        axes.add_patch(FancyArrowPatch((left - 0.2, y), (right, y), arrowstyle="-|>", mutation_scale=8, color=INK))


def _sum(axes: Any, x: float, text: str, dashed: bool = False) -> None:
    """Draw an all-reduce across both ranks, above its direction."""
    axes.plot([x, x], [-0.15, 2.75], color=SUM, linewidth=3, linestyle=":" if dashed else "-")
    axes.text(x, 2.95, text, ha="center", fontsize=7.5, color=SUM)


def draw_cube(path: Path) -> None:
    """Draw every rank of the layout at its indices along data, pipeline and tensor parallelism."""
    figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    slant, rise = 0.8, 1.15 * SIZES["tp"] + 0.4  # a replica stands above the one before, and hides none
    for dp in reversed(range(SIZES["dp"])):
        for tp in range(SIZES["tp"]):
            for pp in reversed(range(SIZES["pp"])):
                x, y = 1.25 * pp + slant * dp, 1.15 * (SIZES["tp"] - 1 - tp) + rise * dp
                rank = rank_at({"pp": pp, "dp": dp, "tp": tp}, SIZES)
                _cube(axes, x, y, GROUP_COLOURS[pp], str(rank))
    wide = 1.25 * SIZES["pp"]
    for start, end, text in (
        ((0.0, -0.25), (wide - 0.3, -0.25), f"pipeline, {SIZES['pp']} stages"),
        ((-0.25, 1.15 * SIZES["tp"] - 0.2), (-0.25, 0.0), f"tensor, {SIZES['tp']}"),
        ((wide + 0.3, 0.0), (wide + 0.3 + slant, rise), f"data, {SIZES['dp']}"),
    ):
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK))
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        if start[0] == end[0]:
            axes.text(middle[0] - 0.15, middle[1], text, ha="right", color=INK, fontsize=9, rotation=90, va="center")
        elif start[1] == end[1]:
            axes.text(middle[0], middle[1] - 0.25, text, ha="center", color=INK, fontsize=9, va="center")
        else:
            axes.text(middle[0] + 0.15, middle[1] - 0.15, text, color=INK, fontsize=9, va="center")
    axes.set_title("Ranks of the grid: neighbours share layers, distant ranks are other stages", fontsize=10, color=INK)
    _save(figure, axes, path, (-0.8, wide + 2.4), (-0.8, 1.15 * SIZES["tp"] + rise * (SIZES["dp"] - 1) + 0.3))


def _cube(axes: Any, x: float, y: float, colour: str, text: str) -> None:
    depth, lift = 0.28, 0.22
    sides = (
        [(x, y), (x + 0.85, y), (x + 0.85, y + 0.85), (x, y + 0.85)],
        [(x, y + 0.85), (x + 0.85, y + 0.85), (x + 0.85 + depth, y + 0.85 + lift), (x + depth, y + 0.85 + lift)],
        [(x + 0.85, y), (x + 0.85 + depth, y + lift), (x + 0.85 + depth, y + 0.85 + lift), (x + 0.85, y + 0.85)],
    )
    for side in sides:
        axes.add_patch(Polygon(side, closed=True, facecolor=colour, edgecolor="white", linewidth=0.8))
    axes.text(x + 0.425, y + 0.425, text, ha="center", va="center", color="white", fontsize=11, weight="bold")


def groups_of_ranks() -> dict[str, list[tuple[int, ...]]]:
    """Return the groups of ranks that send to each other, by axis, as the dry run of each rank has them."""
    config = TrainConfig(
        MODEL,
        ParallelConfig(
            tensor_parallel_size=SIZES["tp"], pipeline_parallel_size=SIZES["pp"], data_parallel_size=SIZES["dp"]
        ),
        training=TrainingConfig(global_batch_size=8, microbatch_size=1),
    )
    run = DryRun(config)
    ranks = [run.rank(rank).groups for rank in range(run.world_size)]
    return {axis: sorted({groups[axis] for groups in ranks}) for axis in ("tp", "pp", "dp")}


def draw_groups(groups: dict[str, list[tuple[int, ...]]], path: Path) -> None:
    """Draw the ranks once for each axis; ranks of one colour send to each other."""
    figure, all_axes = plt.subplots(len(groups), 1, figsize=(8, 3.4), layout="constrained")
    titles = {"tp": "tensor: activations", "pp": "pipeline: activations to neighbours", "dp": "data: gradients"}
    for axes, (axis, of_axis) in zip(all_axes, groups.items(), strict=True):
        for number, ranks in enumerate(of_axis):
            for rank in ranks:
                axes.add_patch(Rectangle((rank, 0), 0.9, 0.9, color=GROUP_COLOURS[number % len(GROUP_COLOURS)]))
                axes.text(rank + 0.45, 0.45, str(rank), ha="center", va="center", color="white", weight="bold")
        axes.set_title(f"{titles[axis]}: {len(of_axis)} groups of {len(of_axis[0])}", fontsize=9, color=INK, loc="left")
        axes.set_xlim(-0.1, 16.1)
        axes.set_ylim(-0.05, 1)
        axes.set_aspect("equal")
        axes.axis("off")
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def _save(figure: Any, axes: Any, path: Path, across: tuple[float, float], up: tuple[float, float]) -> None:
    axes.set_xlim(*across)
    axes.set_ylim(*up)
    axes.axis("off")
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def draw_all(folder: Path) -> None:
    """Draw the three pictures as SVG files of this folder."""
    plt.rcParams["svg.hashsalt"] = "parallelism"
    draw_block(run_on_ranks(record_block, 2)[0], folder / "tensor_parallel_block.svg")
    draw_cube(folder / "rank_cube.svg")
    draw_groups(groups_of_ranks(), folder / "rank_groups.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, default=IMAGES, help="folder of the pictures (default: docs/images)")
    draw_all(parser.parse_args().write)


if __name__ == "__main__":
    main()

"""Pictures of docs/experts.md: the load of the fullest expert over the steps of runs, and the groups of eight ranks.

python benchmarks/expert_pictures.py [--steps 200]

The runs train examples/moe_tiny.toml on one process: without balancing, with its balance loss, with a selection bias.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from fused_megatron.mesh import coordinates

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222255")
RUNS = {
    "no balancing": ["--model.balance-loss=0"],
    "balance loss 0.01": [],
    "selection bias, rate 0.002": ["--model.balance-loss=0", "--model.router-bias-rate=0.002"],
}
METRIC = "expert_load_max_over_mean"
DENSE, EXPERTS = {"dp": 2, "tp": 4}, {"edp": 2, "ep": 2, "etp": 2}


def loads(options: list[str], steps: int) -> list[float]:
    """Train, and return the load of the fullest expert over the mean of every step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fused_megatron", "train", str(ROOT / "examples" / "moe_tiny.toml")]
        command += ["--parallel.expert-parallel-size=1", f"--training.num-steps={steps}", "--training.log-interval=1"]
        command += [f"--training.run-folder={folder}/run", f"--training.eval-interval={steps}", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [entry[METRIC] for entry in map(json.loads, lines) if METRIC in entry]


def draw_loads(path: Path, steps: int) -> None:
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    for colour, (name, options) in zip(COLOURS, RUNS.items(), strict=False):
        found = loads(options, steps)
        print(f"{name}: first {found[0]:.2f}, last {found[-1]:.2f}", flush=True)
        axis.plot(range(1, len(found) + 1), found, label=name, color=colour, linewidth=1.2)
    axis.axhline(1, color="black", linewidth=0.6)
    axis.set_xlabel("step")
    axis.set_ylabel("load of the fullest expert / mean")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def draw_groups(path: Path) -> None:
    """Draw eight ranks twice: coloured by tensor-parallel group, and by the experts that they hold."""
    figure, axes = plt.subplots(2, 1, figsize=(8, 2.6), layout="constrained")
    _draw_ranks(axes[0], DENSE, "dp", "attention: dp=2, tp=4; one colour shares a layer")
    _draw_ranks(axes[1], EXPERTS, "ep", "experts: edp=2, ep=2, etp=2; one colour holds the same experts")
    figure.savefig(path, dpi=120)


def _draw_ranks(axis: Axes, sizes: dict[str, int], coloured: str, title: str) -> None:
    for rank in range(8):
        at = coordinates(rank, sizes)
        axis.barh(0, 0.92, left=rank, color=COLOURS[at[coloured]], alpha=0.75)
        text = f"rank {rank}\n" + " ".join(f"{name}{index}" for name, index in at.items())
        axis.text(rank + 0.46, 0, text, ha="center", va="center", fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.set_xlim(0, 8)
    axis.axis("off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", choices=["loads", "groups"])
    options = parser.parse_args()
    if options.only != "loads":
        draw_groups(IMAGES / "expert_groups.png")
    if options.only != "groups":
        draw_loads(IMAGES / "expert_load.png", options.steps)


if __name__ == "__main__":
    main()

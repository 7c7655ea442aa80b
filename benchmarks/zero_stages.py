"""Picture of what a rank holds in every stage of ZeRO: docs/images/zero_stages.png.

python benchmarks/zero_stages.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fused_megatron.data_parallel.placement import ZERO_STAGES, bytes_per_parameter

REPLICAS = (1, 2, 8, 64)
COLOURS = {"weights": "#4477aa", "gradients": "#ccbb44", "state": "#ee6677"}
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "zero_stages.png"


def draw(path: Path) -> None:
    """Draw stacked bars of bytes a parameter in bfloat16, by stage and number of replicas."""
    figure, axes = plt.subplots(1, len(ZERO_STAGES), sharey=True, figsize=(8, 2.8))
    for axis, stage in zip(axes, ZERO_STAGES, strict=True):
        bottom = [0.0] * len(REPLICAS)
        for part, colour in COLOURS.items():
            heights = [bytes_per_parameter(stage, replicas, 2)[part] for replicas in REPLICAS]
            axis.bar([str(replicas) for replicas in REPLICAS], heights, bottom=bottom, color=colour, label=part)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        for index, total in enumerate(bottom):
            axis.text(index, total + 0.3, f"{total:.1f}", ha="center", fontsize=8)
        axis.set_title(f"stage {stage}", fontsize=10)
        axis.set_xlabel("replicas that share")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("bytes a parameter, bfloat16")
    axes[0].set_ylim(0, 22)
    axes[-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(PICTURE)

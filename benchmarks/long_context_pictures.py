"""Pictures of docs/long_context.md: the partition of a packed batch over ranks, and the timeline of a ring.

python benchmarks/long_context_pictures.py
"""

from itertools import accumulate
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from fused_megatron.context_parallel import partition_for
from fused_megatron.context_parallel.attention_plan import plan_of
from fused_megatron.ops.attention import AttentionMask

IMAGES = Path(__file__).parents[1] / "docs" / "images"
COLOURS = ("#4477aa", "#ccbb44", "#ee6677", "#228833")
RANKS = len(COLOURS)
DOCUMENTS = (5200, 300, 2900, 1, 640, 4100, 1200, 2043)
SEQ_LEN = sum(DOCUMENTS)
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
PAIRS_PER_S = 400e12 / (4 * HEADS * HEAD_DIM)  # forward, at 400 TFLOP/s
BYTES_PER_S = 50e9
ROW_BYTES = 2 * 2 * KV_HEADS * HEAD_DIM  # keys and values in bfloat16
HEIGHT = 0.7


def draw_partition(path: Path) -> None:
    """Draw the positions of every rank for one causal document and for packed documents, and each rank's shares."""
    packed = torch.tensor([0, *accumulate(DOCUMENTS)])
    figure, axes = plt.subplots(2, 2, figsize=(10, 3.4), width_ratios=(4, 1), layout="constrained")
    for row, (title, documents) in enumerate((("one document", None), (f"{len(DOCUMENTS)} documents", packed))):
        mask = AttentionMask(causal=True, documents=documents)
        partition = partition_for("ring", mask, 1, SEQ_LEN, RANKS, num_heads=HEADS, num_kv_heads=KV_HEADS)
        work = partition.work(mask.visibility(1, SEQ_LEN).pairs_of_positions())
        for rank, layout in enumerate(partition.layouts):
            bars = [(start, stop - start) for start, stop in layout.ranges]
            axes[row, 0].broken_barh(bars, (RANKS - 1 - rank, HEIGHT), color=COLOURS[rank])
        for end in () if documents is None else documents.tolist():
            axes[row, 0].axvline(end, color="black", linewidth=0.6)
        axes[row, 0].set_title(f"{title}: positions", fontsize=10)
        axes[row, 0].set_xlim(0, SEQ_LEN)
        shares = [each / (sum(work) / RANKS) for each in work]
        axes[row, 1].barh(range(RANKS - 1, -1, -1), shares, HEIGHT, align="edge", color=COLOURS)
        for rank, share in enumerate(shares):
            axes[row, 1].text(0.03, RANKS - 1 - rank + HEIGHT / 2, f"{share:.3f}", va="center", fontsize=8)
        axes[row, 1].set_title("pairs / mean", fontsize=10)
        axes[row, 1].set_yticks([])
        _name_ranks(axes[row, 0])
    figure.savefig(path, dpi=120)


def draw_ring(path: Path) -> None:
    """Draw attention and messages of every rank, as long as their pairs and bytes take at the rates above."""
    mask = AttentionMask(causal=True)
    partition = partition_for("ring", mask, 1, SEQ_LEN, RANKS, num_heads=HEADS, num_kv_heads=KV_HEADS)
    figure, axis = plt.subplots(figsize=(10, 2.6), layout="constrained")
    for rank in range(RANKS):
        plan = plan_of(partition, mask, 1, rank, 1, gathered=False)
        attends_at = receives_at = posted = 0.0
        low = RANKS - 1 - rank
        for index, hop in enumerate(plan.hops):
            arrives = receives_at
            if index:
                rows = sum(stop - start for start, stop in hop.received)
                # A message is posted when the attention of the hop before it begins.
                begins, length = max(receives_at, posted), rows * ROW_BYTES / BYTES_PER_S
                axis.broken_barh(
                    [(1e3 * begins, 1e3 * length)], (low, HEIGHT / 3), color=COLOURS[hop.source], alpha=0.6
                )
                arrives = receives_at = begins + length
            posted = attends_at = max(attends_at, arrives)
            length = sum(tile.num_pairs for tile in hop.tiles) / PAIRS_PER_S
            axis.broken_barh(
                [(1e3 * attends_at, 1e3 * length)], (low + HEIGHT / 3, HEIGHT * 2 / 3), color=COLOURS[hop.source]
            )
            axis.text(
                1e3 * (attends_at + length / 2),
                low + HEIGHT * 2 / 3,
                f"keys of {hop.source}",
                ha="center",
                va="center",
                fontsize=8,
            )
            attends_at += length
    axis.set_xlabel("ms of the forward, at 400 TFLOP/s and 50 GB/s")
    axis.set_title(
        "attention (above) over the keys of each rank, and the messages (below) that bring them", fontsize=10
    )
    _name_ranks(axis)
    figure.savefig(path, dpi=120)


def _name_ranks(axis: Axes) -> None:
    axis.set_yticks([RANKS - 1 - rank + HEIGHT / 2 for rank in range(RANKS)], [f"rank {rank}" for rank in range(RANKS)])
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    draw_partition(IMAGES / "context_partition.png")
    draw_ring(IMAGES / "ring_timeline.png")

"""Plot of a run's training and validation loss."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_megatron.checkpoint.run_folder import RunFolder


def draw_losses(run: RunFolder) -> bool:
    """Draw the losses of a run folder's metrics, so far; return whether there is a picture.

    A run is worth more than its picture: a full disk leaves the picture before.
    """
    with contextlib.suppress(OSError):
        return plot_loss(run.read_metrics(), run.loss_picture, title=run.path.name)
    return False


def plot_loss(records: Sequence[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw training and validation loss over steps into a PNG file; return False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, and slow to import
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4))
    # Fixed margins: a layout that fits them to the labels draws the picture twice.
    axes = figure.add_axes((0.1, 0.14, 0.87, 0.76))
    training = [(r["step"], r["loss"]) for r in records if "loss" in r]
    validation = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", linewidth=1, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", label="held-out")
        step, loss = validation[-1]
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        axes.annotate(f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(0, 8), ha="center", bbox=box)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    if training or validation:
        axes.legend()
    # Written under another name and renamed, so that a viewer never sees half a picture.
    replacement = path.with_suffix(".tmp.png")
    figure.savefig(replacement, dpi=120)
    replacement.replace(path)
    return True

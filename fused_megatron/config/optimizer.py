"""Settings of the optimizer and its learning rate.

The text under a field is its help on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_megatron.checks import check


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under a cosine schedule with warm-up."""

    lr: float = 1e-3
    """Highest learning rate."""
    min_lr: float = 1e-4
    """Learning rate at the last step."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors (biases, norms) have none."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global 2-norm; 0 leaves them alone."""

    def __post_init__(self) -> None:
        check(self.lr > 0, f"lr={self.lr} must be above 0")
        check(0 <= self.min_lr <= self.lr, f"min_lr={self.min_lr} must lie between 0 and lr={self.lr}")
        check(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must be 0 or more")
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must lie in [0, 1)")
        check(self.eps > 0, f"eps={self.eps} must be above 0")
        check(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must be 0 or more")
        check(self.clip_norm >= 0, f"clip_norm={self.clip_norm} must be 0 or more")

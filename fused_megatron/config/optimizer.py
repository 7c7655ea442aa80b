"""Settings of the optimizer and its learning rate.

The text below a field is its help on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_megatron.checks import check, check_one_of, check_positive

SCHEDULES = ("cosine", "constant", "wsd", "linear")
"""Schedules of the learning rate after warm-up."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    lr: float = 1e-3
    """Highest learning rate."""
    min_lr: float = 1e-4
    """Learning rate after the decay."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    schedule: str = "cosine"
    """Learning rate after warm-up: cosine or linear (decay to min_lr), wsd (constant, decay at the end), constant."""
    decay_steps: int | None = None
    """Steps of the decay from lr to min_lr. None: all steps after warm-up; for wsd, the last tenth of the steps.
    Set it if the run may be extended later: the learning rate then does not depend on num_steps."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors (biases, norms) have none."""
    clip_norm: float = 1.0
    """Largest global 2-norm of the gradients: larger gradients are scaled down to it. 0: no clipping."""

    def __post_init__(self) -> None:
        check(self.lr > 0, f"lr={self.lr} must be above 0")
        check(0 <= self.min_lr <= self.lr, f"min_lr={self.min_lr} must lie between 0 and lr={self.lr}")
        check_one_of("schedule", self.schedule, SCHEDULES)
        if self.decay_steps is not None:
            check_positive("decay_steps", self.decay_steps)
            check(
                self.schedule != "constant",
                f"decay_steps={self.decay_steps} has no place in schedule='constant': leave it out, or choose "
                f"schedule='wsd'",
            )
        check(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must be 0 or more")
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must lie in [0, 1)")
        check(self.eps > 0, f"eps={self.eps} must be above 0")
        check(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must be 0 or more")
        check(self.clip_norm >= 0, f"clip_norm={self.clip_norm} must be 0 or more")

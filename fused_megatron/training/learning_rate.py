"""Learning-rate schedule: a pure function of the step."""

import math

from fused_megatron.config import OptimizerConfig


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up to config.lr, then half a cosine down to config.min_lr at the last step.

    Args:
        step: 0 for the first step.
        num_steps: steps of the whole run.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))

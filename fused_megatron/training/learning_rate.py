"""Learning-rate schedules: pure functions of the step."""

import math

from fused_megatron.config import OptimizerConfig


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of a step: linear warm-up to config.lr, then the curve of config.schedule.

    cosine, linear: decay to config.min_lr over config.decay_steps steps after the warm-up, then config.min_lr. If
        decay_steps is None, the decay ends with the last step of the run.
    wsd: config.lr; a linear decay to config.min_lr over the last config.decay_steps steps of the run (None: a tenth of
        the run).
    constant: config.lr.

    Args:
        step: 0 for the first step.
        num_steps: steps of the whole run.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        decay = max(1, num_steps // 10) if config.decay_steps is None else config.decay_steps
        begin = max(warmup, num_steps - decay)
        progress = (step + 1 - begin) / max(1, num_steps - begin)
    else:
        decay = num_steps - warmup if config.decay_steps is None else config.decay_steps
        progress = (step - warmup) / max(1, decay - 1)
    progress = min(1.0, max(0.0, progress))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_lr + (config.lr - config.min_lr) * share

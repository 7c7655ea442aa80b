"""AdamW over lists of tensors in plain PyTorch."""

import math
from collections.abc import Sequence

import torch


def adamw_(
    main: Sequence[torch.Tensor],
    exp_avg: Sequence[torch.Tensor],
    exp_avg_sq: Sequence[torch.Tensor],
    gradient: Sequence[torch.Tensor],
    low: Sequence[torch.Tensor],
    gradient_scale: torch.Tensor,
    skip: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    zero_gradient: bool,
) -> None:
    """Update main weights and moments in place, as ops.adamw_; every operation is rounded by itself."""
    step_size = lr / (1.0 - beta1**step)
    second_root = math.sqrt(1.0 - beta2**step)
    keep = None if skip is None else skip.reshape(())
    for i, weight in enumerate(main):
        g = gradient[i] * gradient_scale.to(gradient[i].dtype).reshape(())
        m = exp_avg[i] + (g - exp_avg[i]) * (1.0 - beta1)
        v = exp_avg_sq[i] * beta2 + (1.0 - beta2) * g * g
        # By way of float64: torch's float32 square root on the CPU is not always the nearest number.
        root = v.double().sqrt().to(v.dtype)
        w = weight * (1.0 - lr * weight_decay) - step_size * m / (root / second_root + eps)
        targets = [(weight, w), (exp_avg[i], m), (exp_avg_sq[i], v)]
        if low:
            targets.append((low[i], w.to(low[i].dtype)))
        if zero_gradient:
            targets.append((gradient[i], torch.zeros_like(g)))
        for target, value in targets:
            target.copy_(value if keep is None else torch.where(keep, target, value))

"""Placements of training state over data-parallel ranks: which tensors each ZeRO stage shards.

Paper: ZeRO (Rajbhandari et al., arXiv 1910.02054).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Placements:
    """Tensors that a data-parallel rank holds whole (False), or of which it holds only its rows (True).

    Attributes:
        weights: parameters, in the dtype of the model.
        gradients: float32 gradients while they accumulate.
        state: moments, and float32 main weights of parameters in lower precision.
    """

    weights: bool
    gradients: bool
    state: bool


ZERO_STAGES = {
    0: Placements(weights=False, gradients=False, state=False),
    1: Placements(weights=False, gradients=False, state=True),
    2: Placements(weights=False, gradients=True, state=True),
    3: Placements(weights=True, gradients=True, state=True),
}
"""Placements for each parallel.zero_stage."""


def zero_stage(configured: int | None, replicas: int) -> int:
    """Return the configured ZeRO stage; without one, 1 for several ranks with the same weights and 0 for one."""
    return (1 if replicas > 1 else 0) if configured is None else configured


def bytes_per_parameter(stage: int, replicas: int, weight_bytes: int) -> dict[str, float]:
    """Return the bytes a parameter that a rank holds between two steps with AdamW: weights, gradients, state.

    Args:
        stage: ZeRO stage.
        replicas: number of replicas that share the state.
        weight_bytes: bytes of a weight: 4 in float32, 2 in bfloat16, whose state has float32 main weights.
    """
    whole = {"weights": weight_bytes, "gradients": 4, "state": 8 if weight_bytes == 4 else 12}
    placements = ZERO_STAGES[stage]
    return {part: size / (replicas if getattr(placements, part) else 1) for part, size in whole.items()}

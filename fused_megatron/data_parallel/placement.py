"""Placements over the data-parallel ranks: what every stage of ZeRO keeps whole on a rank, and what it shards.

Paper: ZeRO (Rajbhandari et al., arXiv 1910.02054).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Placements:
    """Which tensors a data-parallel rank holds whole (False), and of which only its rows (True).

    Attributes:
        weights: parameters, in the dtype of the model.
        gradients: float32 gradients while they accumulate.
        state: moments, and the float32 main weights of parameters in a lower precision.
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
"""By parallel.zero_stage."""


def zero_stage(configured: int | None, dp_size: int) -> int:
    """The stage of a run: as configured, else 1 where there are several data-parallel ranks, else 0."""
    return (1 if dp_size > 1 else 0) if configured is None else configured


def bytes_per_parameter(stage: int, replicas: int, weight_bytes: int) -> dict[str, float]:
    """Return the bytes a parameter that a rank holds between two steps with AdamW: weights, gradients, state.

    Args:
        stage: of ZeRO.
        replicas: that share.
        weight_bytes: of a weight: 4 in float32, 2 in bfloat16, which has float32 main weights in the state.
    """
    whole = {"weights": weight_bytes, "gradients": 4, "state": 8 if weight_bytes == 4 else 12}
    placements = ZERO_STAGES[stage]
    return {part: size / (replicas if getattr(placements, part) else 1) for part, size in whole.items()}

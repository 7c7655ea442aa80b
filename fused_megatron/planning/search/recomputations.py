"""Recomputations that are searched."""

from fused_megatron.planning.search.layouts import Settings

SHARES_RECOMPUTED = (0.25, 0.5, 0.75)
"""Shares of the blocks of a stage that are recomputed whole, besides all and none."""


def recomputations(first: Settings, num_blocks: int) -> list[Settings]:
    """Return all recomputations of a pipeline: none, selective, parts of the blocks, all.

    Args:
        first: the pipeline.
        num_blocks: blocks of a rank.
    """
    parts = _parts(num_blocks // first.stages_per_rank)
    choices = [("none", None), ("selective", None), *(("full", number) for number in parts), ("full", None)]
    before, zero = first[:4], first.zero_stage
    return [Settings(*before, kind, number, zero) for kind, number in choices]


def least_recomputed(num_blocks: int) -> int:
    """Return the least number of blocks that a stage of num_blocks recomputes whole, if it does so at all."""
    return min(_parts(num_blocks), default=max(1, num_blocks))


def _parts(num_blocks: int) -> list[int]:
    blocks = max(1, num_blocks)
    return [n for n in dict.fromkeys(round(share * blocks) for share in SHARES_RECOMPUTED) if 0 < n < blocks]

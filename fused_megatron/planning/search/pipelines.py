"""Pipelines that are searched: schedules, and their stages a rank."""

PIPELINES: dict[str, tuple[int, ...]] = {
    "1f1b": (1,),
    "interleaved_1f1b": (2, 3, 4, 6, 8),
    "zb_h1": (1,),
    "interleaved_zero_bubble": (2,),
    "zb_v": (2,),
    "v_half": (2,),
}
"""Schedules that are searched, with their stages a rank. gpipe and looped_breadth_first need more memory than 1F1B, and
no less time; dual_pipe_v is as zb_v, with more memory."""
MOST_SPLIT_RANKS = 8
"""Pipeline ranks up to which schedules with a split backward are searched: their bubble is not known without a
simulation, and their lists take seconds to build for more ranks."""
_SPLIT = ("zb_", "v_", "interleaved_zero")


def pipelines(num_ranks: int, num_blocks: int) -> list[tuple[str, int]]:
    """Return the (schedule, stages a rank) that are searched for this number of ranks: all that have enough blocks."""
    if num_ranks == 1:
        return [("1f1b", 1)]
    return [
        (name, per_rank)
        for name, numbers in PIPELINES.items()
        for per_rank in numbers
        if num_ranks * per_rank <= num_blocks + 1 and (num_ranks <= MOST_SPLIT_RANKS or not name.startswith(_SPLIT))
    ]

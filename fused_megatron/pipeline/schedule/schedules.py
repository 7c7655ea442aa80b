"""All schedules by name, as pure functions to lists of actions for each rank; docs/schedules.md shows them."""

from collections.abc import Callable
from dataclasses import dataclass

from fused_megatron.checks import InputError, check
from fused_megatron.pipeline.schedule import zero_bubble
from fused_megatron.pipeline.schedule.action import (
    ONE_STEP_DELAY,
    STASHED,
    SYNCHRONOUS,
    Action,
    Kind,
    Schedule,
    loop_placement,
    peak_live_activations,
    v_placement,
)

Actions = list[Action]


def gpipe(num_ranks: int, num_microbatches: int) -> list[Actions]:
    """GPipe: all forwards, then all backwards. Huang et al., arXiv 1811.06965."""
    return looped_breadth_first(num_ranks, 1, num_microbatches)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> list[Actions]:
    """1F1B (PipeDream-Flush): each backward as soon as possible. Narayanan et al., arXiv 2006.09503."""
    return interleaved_one_f_one_b(num_ranks, 1, num_microbatches)


def interleaved_one_f_one_b(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> list[Actions]:
    """Interleaved 1F1B, for any number of microbatches. Narayanan et al., arXiv 2104.04473."""
    forwards, backwards = _interleaved_order(num_ranks, stages_per_rank, num_microbatches)
    first_group = _group_sizes(num_ranks, num_microbatches)[0]
    lists = []
    for rank in range(num_ranks):
        # Two hops, forward and backward, for each later rank; a whole group in every stage of the rank but the last.
        warmup = min(2 * (num_ranks - 1 - rank) + (stages_per_rank - 1) * first_group, len(forwards))
        if stages_per_rank == 1:
            warmup = min(num_ranks - 1 - rank, len(forwards))
        ahead = [Action(local_stage * num_ranks + rank, Kind.FORWARD, m) for local_stage, m in forwards]
        back = [Action(local_stage * num_ranks + rank, Kind.BACKWARD, m) for local_stage, m in backwards]
        actions = ahead[:warmup]
        for index, backward in enumerate(back):
            actions += [*ahead[warmup + index : warmup + index + 1], backward]
        lists.append(actions)
    return lists


def looped_breadth_first(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> list[Actions]:
    """Looped breadth-first: a stage runs all microbatches before the rank's next stage. Lamy-Poirier, 2211.05953."""
    local_stages, microbatches = range(stages_per_rank), range(num_microbatches)
    return [
        [Action(local_stage * num_ranks + rank, Kind.FORWARD, m) for local_stage in local_stages for m in microbatches]
        + [
            Action(local_stage * num_ranks + rank, Kind.BACKWARD, m)
            for local_stage in reversed(local_stages)
            for m in microbatches
        ]
        for rank in range(num_ranks)
    ]


def zb_h1(num_ranks: int, num_microbatches: int) -> list[Actions]:
    """ZB-H1: 1F1B in which W actions fill the bubble at the end. Qi et al., arXiv 2401.10241."""
    return interleaved_zero_bubble(num_ranks, 1, num_microbatches)


def interleaved_zero_bubble(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> list[Actions]:
    """Interleaved 1F1B with split backward: rank r delays W by r backwards, to fill the bubble at the end."""
    forwards, backwards = _interleaved_order(num_ranks, stages_per_rank, num_microbatches)
    first_group = _group_sizes(num_ranks, num_microbatches)[0]
    lists = []
    for rank in range(num_ranks):
        # Only I lies between a rank and the next, so one hop is enough; 1F1B needs two.
        warmup = min(num_ranks - 1 - rank + (stages_per_rank - 1) * first_group, len(forwards))
        ahead = [Action(local_stage * num_ranks + rank, Kind.FORWARD, m) for local_stage, m in forwards]
        actions = ahead[:warmup]
        weight_grads = [Action(local_stage * num_ranks + rank, Kind.WEIGHT_GRAD, m) for local_stage, m in backwards]
        for index, (local_stage, m) in enumerate(backwards):
            actions += ahead[warmup + index : warmup + index + 1]
            actions.append(Action(local_stage * num_ranks + rank, Kind.INPUT_GRAD, m))
            if index >= rank:
                actions.append(weight_grads[index - rank])
        lists.append(actions + weight_grads[max(0, len(weight_grads) - rank) :])
    return lists


def pipedream_2bw(num_ranks: int, num_microbatches: int, num_steps: int) -> list[Actions]:
    """PipeDream-2BW: 1F1B without a flush, with two versions of the weights and all gradients one step late.

    Narayanan et al., arXiv 2006.09503.
    """
    lists = one_f_one_b(num_ranks, num_microbatches * num_steps)
    return [_with_updates(actions, every=num_microbatches) for actions in lists]


def pipedream(num_ranks: int, num_microbatches: int, num_steps: int) -> list[Actions]:
    """PipeDream: an update after every backward; a microbatch keeps the weights of its forward for its backward.

    Narayanan et al., SOSP 2019.
    """
    return [_with_updates(actions, every=1) for actions in one_f_one_b(num_ranks, num_microbatches * num_steps)]


def _with_updates(actions: Actions, every: int) -> Actions:
    """Add an update after each `every` backwards."""
    result = []
    for action in actions:
        result.append(action)
        if action.kind == Kind.BACKWARD and (action.microbatch + 1) % every == 0:
            result.append(Action(action.stage, Kind.UPDATE, action.microbatch // every))
    return result


def _group_sizes(num_ranks: int, num_microbatches: int) -> list[int]:
    """Divide the microbatches into groups of num_ranks or more, as equal as possible.

    A small last group would cost bubble; a group larger than an earlier one would deadlock.
    """
    groups = max(1, num_microbatches // num_ranks)
    smallest, larger = divmod(num_microbatches, groups)
    return [smallest + 1] * larger + [smallest] * (groups - larger)


def _interleaved_order(
    num_ranks: int, stages_per_rank: int, num_microbatches: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the order of (index of the stage on its rank, microbatch), of forwards and of backwards.

    Each group of microbatches passes all stages of a rank before the next group.
    """
    forwards, backwards, first = [], [], 0
    for size in _group_sizes(num_ranks, num_microbatches):
        group = range(first, first + size)
        forwards += [(local_stage, m) for local_stage in range(stages_per_rank) for m in group]
        backwards += [(local_stage, m) for local_stage in reversed(range(stages_per_rank)) for m in group]
        first += size
    return forwards, backwards


@dataclass(frozen=True)
class ScheduleKind:
    """Row of the table of schedules.

    Attributes:
        generate: (num_ranks, stages_per_rank, num_microbatches, num_steps) -> list of actions for each rank.
        stages_per_rank: the only number that the schedule allows; None: any number.
        placement: "loop" or "v"; see loop_placement and v_placement.
        weights: see `Schedule`; any value but "synchronous" changes the update rule.
    """

    generate: Callable[[int, int, int, int], list[Actions]]
    stages_per_rank: int | None = None
    placement: str = "loop"
    weights: str = SYNCHRONOUS


SCHEDULES: dict[str, ScheduleKind] = {
    "gpipe": ScheduleKind(lambda p, v, m, n: gpipe(p, m), 1),
    "1f1b": ScheduleKind(lambda p, v, m, n: one_f_one_b(p, m), 1),
    "interleaved_1f1b": ScheduleKind(lambda p, v, m, n: interleaved_one_f_one_b(p, v, m)),
    "looped_breadth_first": ScheduleKind(lambda p, v, m, n: looped_breadth_first(p, v, m)),
    "zb_h1": ScheduleKind(lambda p, v, m, n: zb_h1(p, m), 1),
    "interleaved_zero_bubble": ScheduleKind(lambda p, v, m, n: interleaved_zero_bubble(p, v, m)),
    "zb_v": ScheduleKind(lambda p, v, m, n: zero_bubble.zb_v(p, m), 2, "v"),
    "v_half": ScheduleKind(lambda p, v, m, n: zero_bubble.v_half(p, m), 2, "v"),
    "dual_pipe_v": ScheduleKind(lambda p, v, m, n: zero_bubble.dual_pipe_v(p, m), 2, "v"),
    "pipedream_2bw": ScheduleKind(lambda p, v, m, n: pipedream_2bw(p, m, n), 1, weights=ONE_STEP_DELAY),
    "pipedream": ScheduleKind(lambda p, v, m, n: pipedream(p, m, n), 1, weights=STASHED),
}

ASYNCHRONOUS = tuple(name for name, kind in SCHEDULES.items() if kind.weights != SYNCHRONOUS)
"""Schedules that change the update rule."""


def build_schedule(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    stages_per_rank: int | None = None,
    num_steps: int = 1,
    tied: tuple[tuple[int, ...], ...] = (),
) -> Schedule:
    """Build a schedule by name, with compute actions only (`lowering.lower` adds the others).

    Args:
        name: one of SCHEDULES.
        num_ranks: ranks of the pipeline.
        num_microbatches: microbatches of one step.
        stages_per_rank: stages on each rank; None: the least number that the schedule allows.
        num_steps: overlapping steps; above 1 for asynchronous schedules only.
        tied: groups of stages that share one weight.

    Raises:
        InputError: an unknown name; numbers below 1 or that the schedule does not allow.
    """
    if name not in SCHEDULES:
        raise InputError(f"schedule={name!r} must be one of: {', '.join(SCHEDULES)}")
    kind = SCHEDULES[name]
    per_rank = stages_per_rank if stages_per_rank is not None else kind.stages_per_rank or 1
    sizes = {"num_ranks": num_ranks, "stages_per_rank": per_rank, "num_microbatches": num_microbatches}
    for label, value in {**sizes, "num_steps": num_steps}.items():
        check(value >= 1, f"{label}={value} must be 1 or more")
    if kind.stages_per_rank not in (None, per_rank):
        others = [other for other, row in SCHEDULES.items() if row.stages_per_rank in (None, per_rank)]
        raise InputError(
            f"stages_per_rank={per_rank} must be {kind.stages_per_rank} for {name} (others: {', '.join(others)})"
        )
    if kind.weights == SYNCHRONOUS:
        check(num_steps == 1, f"num_steps={num_steps} must be 1 for {name}, whose steps do not overlap")
    if kind.weights == ONE_STEP_DELAY:
        # With fewer microbatches a stage would begin a step before it has the weights of one step ago.
        wanted = f"num_microbatches={num_microbatches} must be at least num_ranks={num_ranks} for {name}"
        check(num_microbatches >= num_ranks, wanted)
    lists = kind.generate(num_ranks, per_rank, num_microbatches, num_steps)
    placement = v_placement(num_ranks) if kind.placement == "v" else loop_placement(num_ranks, per_rank)
    check(not tied or kind.weights == SYNCHRONOUS, f"tied weights need a synchronous schedule, which {name} is not")
    for group in tied:
        check(
            len(set(group)) == len(group) >= 2 and min(group) >= 0 and max(group) < len(placement),
            f"tied={group} must name two or more different stages of 0 to {len(placement) - 1}",
        )
    actions = tuple(tuple(actions) for actions in lists)
    bare = Schedule(name, placement, num_microbatches, actions, num_steps=num_steps, weights=kind.weights, tied=tied)
    return Schedule(**{**vars(bare), "max_live": tuple(peak_live_activations(bare))})

"""Moments of a pipeline schedule that may be the peak of a rank's memory, without repetitions.

A step has thousands of actions; the numbers of microbatches that a rank holds at them take few different values. A
search evaluates many configs of one schedule, so the moments are cached.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from fused_megatron.assembly.pipeline_plan import PipelinePlan
from fused_megatron.pipeline.schedule.action import ENDS_OF_BACKWARD, Action, Kind, stages_of
from fused_megatron.pipeline.schedule.schedules import ASYNCHRONOUS, build_schedule

HOLD_ALL = ("gpipe", "looped_breadth_first")
"""Schedules that hold all microbatches of a step."""
_PERIODS = 4
"""More microbatches than this number times the ranks do not change the moments of any other schedule."""


class Moment(NamedTuple):
    """An action of a rank and what the rank holds when it begins.

    Attributes:
        kind: kind of the action: F, B, I or W.
        stage: stage of the action, counted among the stages of the rank.
        held: for each stage of the rank, microbatches whose activations are held, without the microbatch of this
            action.
        deferred: for each stage, microbatches between I and W, without the microbatch of this action.
        ended: for each stage, backwards of earlier actions of the step, at most 2: the buckets that they sent.
        complete: for each stage, whether earlier actions have completed its gradients.
        posted: whether memory waits for a message of another rank: of the next computation.
        last: the action completes the gradients of the stage.
    """

    kind: Kind
    stage: int
    held: tuple[int, ...]
    deferred: tuple[int, ...]
    ended: tuple[int, ...]
    complete: tuple[bool, ...]
    posted: bool
    last: bool


def rank_moments(plan: PipelinePlan, num_microbatches: int, rank: int) -> tuple[Moment, ...]:
    """Return the moments of a rank in a step, without those that hold no more than another of the same action.

    Raises:
        InputError: the schedule does not allow this number of microbatches.
    """
    return _rank_moments(plan.name, plan.placement, _fewer(plan, num_microbatches), rank)


@lru_cache(maxsize=4096)
def _rank_moments(name: str, placement: tuple[int, ...], num_microbatches: int, rank: int) -> tuple[Moment, ...]:
    most: list[Moment] = []
    # A moment is only covered by one that holds more microbatches in all.
    moments = _moments(placement, rank, _actions(name, placement, num_microbatches)[rank])
    for moment in sorted(moments, key=_num_held, reverse=True):
        if not any(_covers(other, moment) for other in most):
            most.append(moment)
    return tuple(most)


@lru_cache(maxsize=64)
def _actions(name: str, placement: tuple[int, ...], num_microbatches: int) -> tuple[tuple[Action, ...], ...]:
    num_ranks = max(placement) + 1
    num_steps = PipelinePlan(name, placement, ()).most_overlapping(num_microbatches) if name in ASYNCHRONOUS else 1
    return build_schedule(name, num_ranks, num_microbatches, len(placement) // num_ranks, num_steps).actions


def _fewer(plan: PipelinePlan, num_microbatches: int) -> int:
    """Return a number of microbatches that has the same moments: a whole number of rounds fewer."""
    ranks = max(plan.placement) + 1
    if plan.name in HOLD_ALL or (plan.name.startswith("interleaved") and num_microbatches % ranks):
        return num_microbatches  # interleaved schedules divide a remainder among all rounds
    most = _PERIODS * ranks
    return num_microbatches if num_microbatches <= most else most + (num_microbatches - most) % ranks


def _moments(placement: tuple[int, ...], rank: int, actions: Sequence[Action]) -> list[Moment]:
    stages = stages_of(placement, rank)
    position = {stage: index for index, stage in enumerate(stages)}
    last = {action.stage: index for index, action in enumerate(actions) if action.kind in ENDS_OF_BACKWARD}
    held, deferred, ended, complete = ([0] * len(stages) for _ in range(4))
    found: dict[Moment, None] = {}
    for index, (stage, kind, _) in enumerate(actions):
        if kind == Kind.UPDATE:
            continue
        at = position[stage]
        updates = index + 1 < len(actions) and actions[index + 1].kind == Kind.UPDATE
        held[at] -= kind in (Kind.BACKWARD, Kind.INPUT_GRAD)
        deferred[at] -= kind == Kind.WEIGHT_GRAD
        is_last = updates or index == last[stage]
        posted = any(_is_received(placement, action) for action in actions[index + 1 : index + 2])
        moment = Moment(
            kind, at, tuple(held), tuple(deferred), tuple(ended), tuple(map(bool, complete)), posted, is_last
        )
        found[moment] = None
        held[at] += kind == Kind.FORWARD
        deferred[at] += kind == Kind.INPUT_GRAD
        if kind in ENDS_OF_BACKWARD:
            ended[at] = min(ended[at] + 1, 2)
            complete[at] = is_last
    return list(found)


def _is_received(placement: tuple[int, ...], action: Action) -> bool:
    """Return whether the input of an action comes from another rank."""
    before = action.stage + {Kind.FORWARD: -1, Kind.BACKWARD: 1, Kind.INPUT_GRAD: 1}.get(action.kind, 0)
    return 0 <= before < len(placement) and placement[before] != placement[action.stage]


@lru_cache(maxsize=1024)
def needs_no_more_than_the_rank_before(plan: PipelinePlan, num_microbatches: int, rank: int) -> bool:
    """Return whether each moment of a rank holds no more microbatches than one of the rank before it."""
    if rank == 0:
        return False
    before = rank_moments(plan, num_microbatches, rank - 1)
    return all(any(_covers(most, each) for most in before) for each in rank_moments(plan, num_microbatches, rank))


def _num_held(moment: Moment) -> int:
    return sum(moment.held) + sum(moment.deferred)


def _covers(most: Moment, least: Moment) -> bool:
    """Return whether a moment of the same action holds as much in every stage."""
    return (
        most.kind == least.kind
        and most.stage == least.stage
        and most.posted >= least.posted
        and most.last == least.last
        and all(
            a >= b
            for of_most, of_least in zip(most[2:6], least[2:6], strict=True)
            for a, b in zip(of_most, of_least, strict=True)
        )
    )

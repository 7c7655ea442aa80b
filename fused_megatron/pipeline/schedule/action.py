"""Schedules as plain data: for every rank the list of its actions, and the rank of every stage. No torch."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from fused_megatron.checks import InputError, check


class Kind(str, Enum):
    """What an action does. The values are what texts and files of schedules say."""

    FORWARD = "F"
    BACKWARD = "B"
    """The whole backward of a stage."""
    INPUT_GRAD = "I"
    WEIGHT_GRAD = "W"
    SEND_F = "SEND_F"
    SEND_B = "SEND_B"
    RECV_F = "RECV_F"
    RECV_B = "RECV_B"
    REDUCE_GRAD = "REDUCE_GRAD"
    """Sum a stage's gradients over its data-parallel ranks."""
    REDUCE_TIED = "REDUCE_TIED"
    """Sum a tied weight's gradients over its stages."""
    UPDATE = "UPDATE"
    """Asynchronous schedules: make the stage's next weights."""
    UNSHARD = "UNSHARD"
    """Make the stage's weights whole, of which each data-parallel rank may keep a shard."""
    RESHARD = "RESHARD"
    """Keep only this rank's shard of them."""

    # As enum.StrEnum (Python 3.11): the value, wherever text is made.
    def __str__(self) -> str:
        return self.value

    def __format__(self, format_spec: str) -> str:
        return format(self.value, format_spec)


COMPUTE = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD)
SENDS, RECEIVES = (Kind.SEND_F, Kind.SEND_B), (Kind.RECV_F, Kind.RECV_B)
ENDS_OF_BACKWARD = (Kind.BACKWARD, Kind.WEIGHT_GRAD)
"""Behind one of these a microbatch's gradients of the stage are complete, and its activations are free."""
OF_MICROBATCH = frozenset((*COMPUTE, *SENDS, *RECEIVES))
WITHOUT_INDEX = frozenset((Kind.REDUCE_GRAD, Kind.UNSHARD, Kind.RESHARD))
KINDS = frozenset(Kind)

_ACTION = re.compile(rf"(\d+)({'|'.join(sorted(Kind, key=len, reverse=True))})(\d*)")

SYNCHRONOUS, ONE_STEP_DELAY, STASHED = "synchronous", "one_step_delay", "stashed"


class Action(NamedTuple):
    """One thing that a rank does; printed `2F0`: stage 2, forward, microbatch 0.

    A SEND is named after the stage and microbatch that send, a RECV after those that receive. The index counts what
    the kind says: `microbatch`, `tied_group` and `update` name it; None for kinds without one.
    """

    stage: int
    kind: Kind
    index: int | None = None  # type: ignore[assignment]  # in place of tuple.index, which nobody asks

    @property
    def microbatch(self) -> int:
        """Of computations, sends and receives."""
        assert self.kind in OF_MICROBATCH and self.index is not None, f"{self} has no microbatch"
        return self.index

    @property
    def tied_group(self) -> int:
        """Of REDUCE_TIED: the group's place in `Schedule.tied`."""
        assert self.kind == Kind.REDUCE_TIED and self.index is not None, f"{self} has no tied group"
        return self.index

    @property
    def update(self) -> int:
        """Of UPDATE: how many updates of the stage came before it."""
        assert self.kind == Kind.UPDATE and self.index is not None, f"{self} is no update"
        return self.index

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.index is None else self.index}"


_MOST_DIGITS = 7


def parse_action(text: str) -> Action:
    """The action of a text such as `2F0` or `1REDUCE_GRAD`.

    Raises:
        InputError: no action.
    """
    match = _ACTION.fullmatch(text)
    if match is None or (match[2] in WITHOUT_INDEX) != (match[3] == ""):
        raise InputError(
            f"action={text!r:.60} must be a stage, a kind ({', '.join(Kind)}) and a microbatch, such as 2F0"
        )
    if max(len(match[1]), len(match[3])) > _MOST_DIGITS:  # checks count up to what a file names
        raise InputError(f"action={text!r:.40} must have numbers of at most {_MOST_DIGITS} digits")
    return Action(int(match[1]), Kind(match[2]), int(match[3]) if match[3] else None)


@dataclass(frozen=True)
class Schedule:
    """A pipeline schedule.

    Attributes:
        name: as in `schedules.SCHEDULES`, or any other for a schedule of one's own.
        placement: the rank of each stage.
        num_microbatches: of one step.
        actions: per rank, in order.
        lowered: whether sends, receives and reductions are in the lists (`lowering.lower`).
        num_steps: more than 1 only where steps overlap (asynchronous schedules); microbatches count on through them.
        weights: which weights a microbatch sees: "synchronous" (one version a step), "one_step_delay" (PipeDream-2BW)
            or "stashed" (PipeDream); the last two **change the update rule**. See `weight_versions`.
        max_live: per rank, how many forward activations of a stage may be alive at once; None: no limit.
        tied: groups of stages that share one weight.
    """

    name: str
    placement: tuple[int, ...]
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]
    lowered: bool = False
    num_steps: int = 1
    weights: str = SYNCHRONOUS
    max_live: tuple[int, ...] | None = None
    tied: tuple[tuple[int, ...], ...] = ()

    @property
    def num_ranks(self) -> int:
        return len(self.actions)

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    @property
    def microbatches(self) -> range:
        """All microbatches, of all steps."""
        return range(self.num_microbatches * self.num_steps)


def loop_placement(num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """Stage s on rank s % num_ranks."""
    return tuple(range(num_ranks)) * stages_per_rank


def v_placement(num_ranks: int) -> tuple[int, ...]:
    """Two stages a rank, down and up again: the first and the last stage are on rank 0."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def stages_of(placement: Sequence[int], rank: int) -> tuple[int, ...]:
    """The stages of a rank, ascending."""
    return tuple(stage for stage, owner in enumerate(placement) if owner == rank)


def num_ranks_of(placement: Sequence[int]) -> int:
    """Return the number of ranks of a placement.

    Raises:
        InputError: unless the ranks are 0, 1, ... with the same number of stages each.
    """
    check(len(placement) > 0, "placement=() must name a rank for every stage")
    num_ranks = max(placement) + 1
    counts = [sum(owner == rank for owner in placement) for rank in range(num_ranks)]
    if min(placement) < 0 or len(set(counts)) != 1:
        shown = ", ".join(str(owner) for owner in placement)
        raise InputError(f"placement=({shown}) must give every rank from 0 on the same number of stages")
    return num_ranks


def live_activations(actions: Iterable[Action]) -> list[int]:
    """After each action of a rank, how many forward activations of a stage it keeps (until B or W)."""
    live, kept = 0, []
    for action in actions:
        live += (action.kind == Kind.FORWARD) - (action.kind in ENDS_OF_BACKWARD)
        kept.append(live)
    return kept


def peak_live_activations(schedule: Schedule) -> list[int]:
    """Per rank, the most forward activations alive at once, each of one stage and one microbatch."""
    return [max(live_activations(actions), default=0) for actions in schedule.actions]


def weight_versions(schedule: Schedule) -> dict[tuple[int, int], int]:
    """(stage, microbatch) -> how many updates made the weights that its forward **and** its backward use.

    synchronous: 0. one_step_delay, step t: max(0, t - 1), so w(t + 1) = w(t) - lr * g(w(t - 1)) on every stage.
    stashed: the newest at its forward, kept for its backward; older by the stages that follow.
    """
    versions = {}
    for actions in schedule.actions:
        made: dict[int, int] = {}
        for action in actions:
            stage = action.stage
            if action.kind == Kind.UPDATE:
                made[stage] = made.get(stage, 0) + 1
            elif action.kind == Kind.FORWARD:
                version = made.get(stage, 0) if schedule.weights == STASHED else 0
                if schedule.weights == ONE_STEP_DELAY:
                    version = max(0, action.microbatch // schedule.num_microbatches - 1)
                versions[stage, action.microbatch] = version
    return versions


def peak_weight_versions(schedule: Schedule) -> list[int]:
    """Per rank, the most versions of one stage's weights that must be kept at once: the newest and those in use."""
    versions, peaks = weight_versions(schedule), []
    for actions in schedule.actions:
        peak, newest = 1, dict.fromkeys((a.stage for a in actions), 0)
        in_use: dict[int, list[int]] = {stage: [] for stage in newest}
        for action in actions:
            stage = action.stage
            if action.kind == Kind.UPDATE:
                newest[stage] += 1
            elif action.kind == Kind.FORWARD:
                in_use[stage].append(versions[stage, action.microbatch])
            elif action.kind in ENDS_OF_BACKWARD:
                in_use[stage].remove(versions[stage, action.microbatch])
            peak = max(peak, len({newest[stage], *in_use[stage]}))
        peaks.append(peak)
    return peaks

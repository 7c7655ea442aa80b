"""Schedules as plain data: a list of actions for every rank, and the rank of every stage. No torch."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from fused_megatron.checks import InputError, check


class Kind(str, Enum):
    """Kind of an action. The values are the names in texts and files of schedules."""

    FORWARD = "F"
    BACKWARD = "B"
    """Whole backward of a stage."""
    INPUT_GRAD = "I"
    """Part of a backward that computes the gradient of the stage's input."""
    WEIGHT_GRAD = "W"
    """Part of a backward that computes the gradients of the stage's weights."""
    SEND_F = "SEND_F"
    SEND_B = "SEND_B"
    RECV_F = "RECV_F"
    RECV_B = "RECV_B"
    REDUCE_GRAD = "REDUCE_GRAD"
    """Sum of a stage's gradients over its data-parallel ranks."""
    REDUCE_TIED = "REDUCE_TIED"
    """Sum of a tied weight's gradients over its stages."""
    UPDATE = "UPDATE"
    """Update of a stage's weights, in asynchronous schedules."""
    UNSHARD = "UNSHARD"
    """Gather of a stage's full weights, of which each data-parallel rank may keep a shard."""
    RESHARD = "RESHARD"
    """Release of a stage's full weights, except this rank's shard."""

    __hash__ = str.__hash__  # Enum's own is a Python function, which a simulation calls a million times

    # The text of a kind is its value, as for enum.StrEnum of Python 3.11.
    def __str__(self) -> str:
        return self.value

    def __format__(self, format_spec: str) -> str:
        return format(self.value, format_spec)


COMPUTE = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD)
SENDS, RECEIVES = (Kind.SEND_F, Kind.SEND_B), (Kind.RECV_F, Kind.RECV_B)
ENDS_OF_BACKWARD = (Kind.BACKWARD, Kind.WEIGHT_GRAD)
"""After one of these a microbatch's gradients in the stage are complete, and its activations are free."""
OF_MICROBATCH = frozenset((*COMPUTE, *SENDS, *RECEIVES))
WITHOUT_INDEX = frozenset((Kind.REDUCE_GRAD, Kind.UNSHARD, Kind.RESHARD))
KINDS = frozenset(Kind)

_ACTION = re.compile(rf"(\d+)({'|'.join(sorted(Kind, key=len, reverse=True))})(\d*)")

SYNCHRONOUS, ONE_STEP_DELAY, STASHED = "synchronous", "one_step_delay", "stashed"


class Action(NamedTuple):
    """An action of a rank; its text is `2F0` for stage 2, forward, microbatch 0.

    The stage of a SEND is the sender, the stage of a RECV is the receiver. The meaning of the index depends on the
    kind: see `microbatch`, `tied_group` and `update`. It is None for kinds without an index.
    """

    stage: int
    kind: Kind
    index: int | None = None  # type: ignore[assignment]  # hides tuple.index, which is not used

    @property
    def microbatch(self) -> int:
        """Index of the microbatch of a computation, send or receive."""
        assert self.kind in OF_MICROBATCH and self.index is not None, f"{self} has no microbatch"
        return self.index

    @property
    def tied_group(self) -> int:
        """Index in `Schedule.tied` of the group of a REDUCE_TIED."""
        assert self.kind == Kind.REDUCE_TIED and self.index is not None, f"{self} has no tied group"
        return self.index

    @property
    def update(self) -> int:
        """Number of updates of the stage before this UPDATE."""
        assert self.kind == Kind.UPDATE and self.index is not None, f"{self} is no update"
        return self.index

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.index is None else self.index}"


_MOST_DIGITS = 7


def parse_action(text: str) -> Action:
    """Parse the text of an action, such as `2F0` or `1REDUCE_GRAD`.

    Raises:
        InputError: the text is no action.
    """
    match = _ACTION.fullmatch(text)
    if match is None or (match[2] in WITHOUT_INDEX) != (match[3] == ""):
        raise InputError(
            f"action={text!r:.60} must be a stage, a kind ({', '.join(Kind)}) and a microbatch, such as 2F0"
        )
    if max(len(match[1]), len(match[3])) > _MOST_DIGITS:  # checks count up to the numbers in a file
        raise InputError(f"action={text!r:.40} must have numbers of at most {_MOST_DIGITS} digits")
    return Action(int(match[1]), Kind(match[2]), int(match[3]) if match[3] else None)


@dataclass(frozen=True)
class Schedule:
    """A pipeline schedule.

    Attributes:
        name: a name in `schedules.SCHEDULES`, or any other name for a schedule of the user.
        placement: the rank of each stage.
        num_microbatches: microbatches of one step.
        actions: the actions of each rank, in order.
        lowered: whether the lists contain sends, receives and reductions (`lowering.lower`).
        num_steps: number of steps; above 1 only if steps overlap (asynchronous schedules). Microbatches are numbered
            through all steps.
        weights: the version of the weights that a microbatch uses: "synchronous" (one version in a step),
            "one_step_delay" (PipeDream-2BW) or "stashed" (PipeDream); the last two **change the update rule**. See
            `weight_versions`.
        max_live: for each rank the most forward activations of a stage that may be alive at once; None: no limit.
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
        """Microbatches of all steps."""
        return range(self.num_microbatches * self.num_steps)


def loop_placement(num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """Place stage s on rank s % num_ranks."""
    return tuple(range(num_ranks)) * stages_per_rank


def v_placement(num_ranks: int) -> tuple[int, ...]:
    """Place two stages on each rank, in a V: up the ranks and back, so that rank 0 has the first and the last stage."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def stages_of(placement: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return the stages of a rank, ascending."""
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
    """Return for each action of a rank the number of forward activations that are alive after it (until B or W)."""
    live, kept = 0, []
    for action in actions:
        live += (action.kind == Kind.FORWARD) - (action.kind in ENDS_OF_BACKWARD)
        kept.append(live)
    return kept


def peak_live_activations(schedule: Schedule) -> list[int]:
    """Return for each rank the most forward activations alive at once, each of one stage and one microbatch."""
    return [max(live_activations(actions), default=0) for actions in schedule.actions]


def updates_behind(schedule: Schedule, stage: int) -> int:
    """Return the number of updates by which the weights of a microbatch are older than the newest of its update.

    synchronous: 0. one_step_delay: 1 on every stage. stashed: the number of later stages, as many as a microbatch
    passes between its forward and its backward.
    """
    if schedule.weights == ONE_STEP_DELAY:
        return 1
    return schedule.num_stages - 1 - stage if schedule.weights == STASHED else 0


def microbatches_of_update(schedule: Schedule) -> int:
    """Return the number of microbatches whose gradients one update takes."""
    return 1 if schedule.weights == STASHED else schedule.num_microbatches


def weight_versions(schedule: Schedule) -> dict[tuple[int, int], int]:
    """Return for each (stage, microbatch) the number of updates in the weights of its forward **and** its backward.

    Synchronous: 0. Otherwise update t uses max(0, t - updates_behind), counted from the first update of the training,
    so with one_step_delay w(t + 1) = w(t) - lr * g(w(t - 1)) on every stage.
    """
    if schedule.weights == SYNCHRONOUS:
        return {(stage, m): 0 for stage in range(schedule.num_stages) for m in schedule.microbatches}
    every = microbatches_of_update(schedule)
    return {
        (stage, m): max(0, m // every - updates_behind(schedule, stage))
        for stage in range(schedule.num_stages)
        for m in schedule.microbatches
    }


def peak_weight_versions(schedule: Schedule) -> list[int]:
    """Return for each rank the most versions of a stage's weights kept at once, the newest included.

    A version is kept until the update for which no later microbatch uses it, also from one call to the next.
    """
    behind: list[list[int]] = [[] for _ in range(schedule.num_ranks)]
    for stage, rank in enumerate(schedule.placement):
        behind[rank].append(updates_behind(schedule, stage))
    return [1 + max(each, default=0) for each in behind]

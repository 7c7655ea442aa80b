"""Lowering of a schedule: from computations to all that a rank does (messages, reductions, gathers of weights)."""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace

from fused_megatron.checks import InputError, check
from fused_megatron.pipeline.schedule.action import (
    COMPUTE,
    ENDS_OF_BACKWARD,
    SYNCHRONOUS,
    Action,
    Kind,
    Schedule,
)
from fused_megatron.pipeline.schedule.routing import input_of, output_of, peer
from fused_megatron.pipeline.schedule.schedule_checks import schedule_findings


def lower(schedule: Schedule, max_unsharded: int | None = None) -> Schedule:
    """The schedule with sends, receives and reductions, and with gathers of sharded weights where asked.

    - A send stands right behind what makes it. A receive stands right before what uses it, or earlier, so that each
      channel (from rank, to rank, direction) is received from in the order in which it is sent to. So a rank only ever
      waits for a message whose sender needs nothing that comes after it, and nothing can deadlock.
    - A stage's gradients are reduced right behind its last backward (where steps overlap: before each update).
    - Tied weights come last, in the same order on all ranks.

    Args:
        schedule: of compute actions.
        max_unsharded: of how many stages a rank keeps whole weights at once: an UNSHARD stands before each stretch of a
            stage's computations and a RESHARD behind it. None: none, every rank always has the whole weights.

    Raises:
        InputError: a schedule that is lowered already, or with a fault (the first one is named); max_unsharded below 1,
            or for a schedule that has UNSHARD or is asynchronous.
    """
    if schedule.lowered:
        raise InputError(f"schedule {schedule.name}: it is lowered already")
    if findings := schedule_findings(schedule):
        raise InputError(f"schedule {schedule.name}: {findings[0]}")
    if max_unsharded is not None:
        schedule = _unsharding(schedule, max_unsharded)
    receives = _receives(schedule)
    lists = []
    for rank, actions in enumerate(schedule.actions):
        reduce_after = _last_backwards(actions)
        lowered: list[Action] = []
        for position, action in enumerate(actions):
            if action.kind == Kind.UPDATE:
                lowered.append(Action(action.stage, Kind.REDUCE_GRAD))
            lowered += [*receives[rank, position], action]
            if send := _send_behind(schedule, action):
                lowered.append(send)
            if position in reduce_after and not any(other.kind == Kind.UPDATE for other in actions):
                lowered.append(Action(action.stage, Kind.REDUCE_GRAD))
        for index, group in enumerate(schedule.tied):
            own = [stage for stage in group if schedule.placement[stage] == rank]
            lowered += [Action(stage, Kind.REDUCE_TIED, index) for stage in sorted(own)[:1]]
        lists.append(tuple(lowered))
    return replace(schedule, actions=tuple(lists), lowered=True)


def _send_behind(schedule: Schedule, action: Action) -> Action | None:
    """The send behind a compute action; None where what it makes stays on the rank."""
    if action.kind not in (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRAD):
        return None
    send = output_of(action)
    receiver = peer(send).stage
    if not 0 <= receiver < schedule.num_stages or schedule.placement[receiver] == schedule.placement[action.stage]:
        return None
    return send


def _receives(schedule: Schedule) -> dict[tuple[int, int], list[Action]]:
    """(rank, position of a compute action) -> the receives that stand before it."""
    consumers = {}
    for rank, actions in enumerate(schedule.actions):
        for position, action in enumerate(actions):
            if action.kind in (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRAD):
                consumers[input_of(action)] = (rank, position)
    placed: defaultdict[tuple[int, int], list[Action]] = defaultdict(list)
    for actions in schedule.actions:
        # Backwards, so that no receive of a channel stands behind one that is sent after it.
        earliest: dict[tuple[int, Kind], int] = {}
        for action in reversed(actions):
            if send := _send_behind(schedule, action):
                receive = peer(send)
                target, position = consumers[receive]
                channel = (target, receive.kind)
                earliest[channel] = min(position, earliest.get(channel, position))
                placed[target, earliest[channel]].insert(0, receive)
    return placed


def _last_backwards(actions: Sequence[Action]) -> set[int]:
    """The positions of the last B or W of each stage."""
    return set({a.stage: position for position, a in enumerate(actions) if a.kind in ENDS_OF_BACKWARD}.values())


def _unsharding(schedule: Schedule, max_unsharded: int) -> Schedule:
    name, everything = schedule.name, [action for actions in schedule.actions for action in actions]
    check(max_unsharded >= 1, f"max_unsharded={max_unsharded} must be 1 or more (None: weights are never sharded)")
    check(
        schedule.weights == SYNCHRONOUS,
        f"max_unsharded={max_unsharded} needs a synchronous schedule, which {name} is not",
    )
    check(
        not any(action.kind in (Kind.UNSHARD, Kind.RESHARD) for action in everything),
        f"max_unsharded={max_unsharded}: schedule {name} has UNSHARD and RESHARD of its own (leave max_unsharded out)",
    )
    return replace(schedule, actions=tuple(_unsharding_of_rank(a, max_unsharded) for a in schedule.actions))


def _unsharding_of_rank(actions: Sequence[Action], max_unsharded: int) -> tuple[Action, ...]:
    """Where a stage must make room, it is the one that computes again last: no choice gathers less often."""
    uses: dict[int, deque[int]] = {}
    for position, action in enumerate(actions):
        if action.kind in COMPUTE:
            uses.setdefault(action.stage, deque()).append(position)
    result: list[Action] = []
    whole: list[int] = []
    for action in actions:
        stage = action.stage
        if stage not in whole:
            if len(whole) == max_unsharded:
                latest = max(whole, key=lambda other: uses[other][0])
                whole.remove(latest)
                result.append(Action(latest, Kind.RESHARD))
            whole.append(stage)
            result.append(Action(stage, Kind.UNSHARD))
        result.append(action)
        uses[stage].popleft()
        if not uses[stage]:
            whole.remove(stage)
            result.append(Action(stage, Kind.RESHARD))
    return tuple(result)

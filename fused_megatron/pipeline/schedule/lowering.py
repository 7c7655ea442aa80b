"""Lowering of a schedule: adding messages, reductions, and gathers of sharded weights to its computations."""

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


def lower(schedule: Schedule, max_unsharded: int | None = None, reduce_each_microbatch: bool = False) -> Schedule:
    """Return the schedule with sends, receives and reductions, and optionally with gathers of sharded weights.

    - A send directly follows its computation. A receive directly precedes its use, or comes earlier, so that the
      receives of each channel (from rank, to rank, direction) have the order of its sends. So a rank waits only for
      messages whose sender needs nothing that comes later, and there is no deadlock.
    - The gradients of a stage are reduced directly after its last backward (if steps overlap, before each update), or
      after every backward.
    - Reductions of tied weights come last, in the same order on all ranks.

    Args:
        schedule: a schedule of compute actions.
        max_unsharded: number of stages whose full weights a rank keeps at once. An UNSHARD comes before each run of a
            stage's computations, and a RESHARD after it. None: every rank always keeps the full weights.
        reduce_each_microbatch: whether gradients are reduced after every backward, since ranks keep only sums.

    Raises:
        InputError: the schedule is lowered already, or breaks a rule (the first breach is named); max_unsharded is
            below 1, or the schedule has UNSHARD or is asynchronous; reduce_each_microbatch and the schedule is
            asynchronous.
    """
    if schedule.lowered:
        raise InputError(f"schedule {schedule.name}: it is lowered already")
    if findings := schedule_findings(schedule):
        raise InputError(f"schedule {schedule.name}: {findings[0]}")
    if max_unsharded is not None:
        schedule = _unsharding(schedule, max_unsharded)
    check(
        not reduce_each_microbatch or schedule.weights == SYNCHRONOUS,
        f"reduce_each_microbatch=True needs a synchronous schedule, which {schedule.name} is not",
    )
    receives = _receives(schedule)
    lists = []
    for rank, actions in enumerate(schedule.actions):
        reduce_after = _ends_of_backwards(actions) if reduce_each_microbatch else _last_backwards(actions)
        lowered: list[Action] = []
        for position, action in enumerate(actions):
            if action.kind == Kind.UPDATE:
                lowered.append(Action(action.stage, Kind.REDUCE_GRAD))
            lowered += [*receives[rank, position], action]
            if send := _send_after(schedule, action):
                lowered.append(send)
            if position in reduce_after and not any(other.kind == Kind.UPDATE for other in actions):
                lowered.append(Action(action.stage, Kind.REDUCE_GRAD))
        for index, group in enumerate(schedule.tied):
            own = [stage for stage in group if schedule.placement[stage] == rank]
            lowered += [Action(stage, Kind.REDUCE_TIED, index) for stage in sorted(own)[:1]]
        lists.append(tuple(lowered))
    return replace(schedule, actions=tuple(lists), lowered=True)


def _send_after(schedule: Schedule, action: Action) -> Action | None:
    """Return the send after a compute action; None if its result stays on the rank."""
    if action.kind not in (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRAD):
        return None
    send = output_of(action)
    receiver = peer(send).stage
    if not 0 <= receiver < schedule.num_stages or schedule.placement[receiver] == schedule.placement[action.stage]:
        return None
    return send


def _receives(schedule: Schedule) -> dict[tuple[int, int], list[Action]]:
    """Return the receives before each compute action, by (rank, position of the compute action)."""
    consumers = {}
    for rank, actions in enumerate(schedule.actions):
        for position, action in enumerate(actions):
            if action.kind in (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRAD):
                consumers[input_of(action)] = (rank, position)
    placed: defaultdict[tuple[int, int], list[Action]] = defaultdict(list)
    for actions in schedule.actions:
        # From the last send to the first, so that no receive comes after the receive of a later send.
        earliest: dict[tuple[int, Kind], int] = {}
        for action in reversed(actions):
            if send := _send_after(schedule, action):
                receive = peer(send)
                target, position = consumers[receive]
                channel = (target, receive.kind)
                earliest[channel] = min(position, earliest.get(channel, position))
                placed[target, earliest[channel]].insert(0, receive)
    return placed


def _last_backwards(actions: Sequence[Action]) -> set[int]:
    """Return the positions of the last B or W of each stage."""
    return set({a.stage: position for position, a in enumerate(actions) if a.kind in ENDS_OF_BACKWARD}.values())


def _ends_of_backwards(actions: Sequence[Action]) -> set[int]:
    return {position for position, action in enumerate(actions) if action.kind in ENDS_OF_BACKWARD}


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
    """Insert UNSHARD and RESHARD. The stage that is released is the one whose next use is latest: fewest gathers."""
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

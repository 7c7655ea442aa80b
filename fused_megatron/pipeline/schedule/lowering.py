"""From compute actions to all that a rank does: sends, receives, and the reductions of gradients."""

from collections import defaultdict
from dataclasses import replace

from fused_megatron.checks import InputError
from fused_megatron.pipeline.schedule.action import (
    BACKWARD,
    FORWARD,
    INPUT_GRAD,
    RECV_B,
    RECV_F,
    REDUCE_GRAD,
    REDUCE_TIED,
    SEND_B,
    SEND_F,
    UPDATE,
    WEIGHT_GRAD,
    Action,
    Schedule,
)
from fused_megatron.pipeline.schedule.schedule_checks import check_schedule


def lower(schedule: Schedule) -> Schedule:
    """The schedule with sends, receives and reductions.

    - A send stands right behind what makes it. A receive stands right before what uses it, or earlier, so that each
      channel (from rank, to rank, direction) is received from in the order in which it is sent to. So a rank only ever
      waits for a message whose sender needs nothing that comes after it, and nothing can deadlock.
    - A stage's gradients are reduced right behind its last backward (where steps overlap: before each update).
    - Tied weights come last, in the same order on all ranks.

    Raises:
        InputError: a schedule that is lowered already, or with a fault (the first one is named).
    """
    if schedule.lowered:
        raise InputError(f"schedule {schedule.name}: it is lowered already")
    if findings := check_schedule(schedule):
        raise InputError(f"schedule {schedule.name}: {findings[0]}")
    receives = _receives(schedule)
    lists = []
    for rank, actions in enumerate(schedule.actions):
        reduce_after = _last_backwards(actions)
        lowered: list[Action] = []
        for position, action in enumerate(actions):
            if action.kind == UPDATE:
                lowered.append(Action(action.stage, REDUCE_GRAD))
            lowered += [*receives[rank, position], action]
            if sent := message_of(schedule, action):
                lowered.append(sent[0])
            if position in reduce_after and not any(other.kind == UPDATE for other in actions):
                lowered.append(Action(action.stage, REDUCE_GRAD))
        for index, group in enumerate(schedule.tied):
            own = [stage for stage in group if schedule.placement[stage] == rank]
            lowered += [Action(stage, REDUCE_TIED, index) for stage in sorted(own)[:1]]
        lists.append(tuple(lowered))
    return replace(schedule, actions=tuple(lists), lowered=True)


def message_of(schedule: Schedule, action: Action) -> tuple[Action, Action] | None:
    """The send behind a compute action and its receive; None where what it makes stays on the rank."""
    stage, kind, microbatch = action
    step = 1 if kind == FORWARD else -1 if kind in (BACKWARD, INPUT_GRAD) else 0
    peer = stage + step
    if not step or not 0 <= peer < schedule.num_stages or schedule.placement[peer] == schedule.placement[stage]:
        return None
    send, receive = (SEND_F, RECV_F) if step == 1 else (SEND_B, RECV_B)
    return Action(stage, send, microbatch), Action(peer, receive, microbatch)


def _receives(schedule: Schedule) -> dict[tuple[int, int], list[Action]]:
    """(rank, position of a compute action) -> the receives that stand before it."""
    consumers = {}
    for rank, actions in enumerate(schedule.actions):
        for position, (stage, kind, microbatch) in enumerate(actions):
            if kind in (FORWARD, BACKWARD, INPUT_GRAD):
                consumers[stage, RECV_F if kind == FORWARD else RECV_B, microbatch] = (rank, position)
    placed: defaultdict[tuple[int, int], list[Action]] = defaultdict(list)
    for actions in schedule.actions:
        # Backwards, so that no receive of a channel stands behind one that is sent after it.
        earliest: dict[tuple[int, str], int] = {}
        for action in reversed(actions):
            if message := message_of(schedule, action):
                receive = message[1]
                target, position = consumers[receive]
                channel = (target, receive.kind)
                earliest[channel] = min(position, earliest.get(channel, position))
                placed[target, earliest[channel]].insert(0, receive)
    return placed


def _last_backwards(actions: tuple[Action, ...]) -> set[int]:
    """The positions of the last B or W of each stage."""
    last = {action.stage: position for position, action in enumerate(actions) if action.kind in (BACKWARD, WEIGHT_GRAD)}
    return set(last.values())

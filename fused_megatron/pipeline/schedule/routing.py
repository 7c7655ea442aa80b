"""Routes of messages between stages: the receive of each send, and the channel that both use."""

from typing import NamedTuple

from fused_megatron.pipeline.schedule.action import SENDS, Action, Kind, Schedule

FORWARD_DIRECTION, BACKWARD_DIRECTION = "forward", "backward"
DIRECTIONS = (FORWARD_DIRECTION, BACKWARD_DIRECTION)

# Kind of a message -> kind of its other end, and the step to the stage of the other end.
_OTHER_END = {
    Kind.SEND_F: (Kind.RECV_F, 1),
    Kind.RECV_F: (Kind.SEND_F, -1),
    Kind.SEND_B: (Kind.RECV_B, -1),
    Kind.RECV_B: (Kind.SEND_B, 1),
}


class Channel(NamedTuple):
    """Channel from one rank to another, for activations or for gradients."""

    source: int
    target: int
    direction: str


def peer(action: Action) -> Action:
    """Return the receive of a send, or the send of a receive."""
    kind, step = _OTHER_END[action.kind]
    return Action(action.stage + step, kind, action.index)


def channel_of(schedule: Schedule, action: Action) -> Channel:
    """Return the channel of a send or receive."""
    own, other = schedule.placement[action.stage], schedule.placement[peer(action).stage]
    direction = FORWARD_DIRECTION if action.kind in (Kind.SEND_F, Kind.RECV_F) else BACKWARD_DIRECTION
    return Channel(own, other, direction) if action.kind in SENDS else Channel(other, own, direction)


def channels_of(schedule: Schedule) -> set[Channel]:
    """Return every channel that a lowered schedule uses."""
    return {channel_of(schedule, a) for actions in schedule.actions for a in actions if a.kind in SENDS}


def input_of(action: Action) -> Action:
    """Return the receive of the input of an F, B or I; it names the input also if that comes from the same rank."""
    return Action(action.stage, Kind.RECV_F if action.kind == Kind.FORWARD else Kind.RECV_B, action.index)


def output_of(action: Action) -> Action:
    """Return the send of the result of an F, B or I; it names the result also if the next stage is on the same rank."""
    return Action(action.stage, Kind.SEND_F if action.kind == Kind.FORWARD else Kind.SEND_B, action.index)

"""Routes of the messages between stages: what a receive answers, and the channel that both sides use."""

from typing import NamedTuple

from fused_megatron.pipeline.schedule.action import SENDS, Action, Kind, Schedule

FORWARD_DIRECTION, BACKWARD_DIRECTION = "forward", "backward"
DIRECTIONS = (FORWARD_DIRECTION, BACKWARD_DIRECTION)

# Kind of a message -> that of its other end, and the step from stage to stage.
_OTHER_END = {
    Kind.SEND_F: (Kind.RECV_F, 1),
    Kind.RECV_F: (Kind.SEND_F, -1),
    Kind.SEND_B: (Kind.RECV_B, -1),
    Kind.RECV_B: (Kind.SEND_B, 1),
}


class Channel(NamedTuple):
    """What two ranks use for the activations, or for the gradients, that pass from one to the other."""

    source: int
    target: int
    direction: str


def peer(action: Action) -> Action:
    """The receive of a send, and the send of a receive."""
    kind, step = _OTHER_END[action.kind]
    return Action(action.stage + step, kind, action.index)


def channel_of(schedule: Schedule, action: Action) -> Channel:
    """The channel of a send or receive."""
    own, other = schedule.placement[action.stage], schedule.placement[peer(action).stage]
    direction = FORWARD_DIRECTION if action.kind in (Kind.SEND_F, Kind.RECV_F) else BACKWARD_DIRECTION
    return Channel(own, other, direction) if action.kind in SENDS else Channel(other, own, direction)


def channels_of(schedule: Schedule) -> set[Channel]:
    """Every channel that a lowered schedule uses."""
    return {channel_of(schedule, a) for actions in schedule.actions for a in actions if a.kind in SENDS}


def input_of(action: Action) -> Action:
    """The receive that brings what F, B or I works on, whether a message or a stage of the same rank makes it."""
    return Action(action.stage, Kind.RECV_F if action.kind == Kind.FORWARD else Kind.RECV_B, action.index)


def output_of(action: Action) -> Action:
    """The send that takes on what F, B or I makes; nothing is sent where the next stage is on the same rank."""
    return Action(action.stage, Kind.SEND_F if action.kind == Kind.FORWARD else Kind.SEND_B, action.index)

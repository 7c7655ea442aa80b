"""Start here when a message goes to the wrong rank, or over the wrong channel."""

from fused_megatron.pipeline import build_schedule, lower, parse_action
from fused_megatron.pipeline.schedule.action import RECEIVES, SENDS
from fused_megatron.pipeline.schedule.routing import Channel, channel_of, channels_of, input_of, output_of, peer


def test_both_ends_of_a_message_name_one_channel() -> None:
    schedule = lower(build_schedule("zb_v", 3, 4))
    ends = [a for actions in schedule.actions for a in actions if a.kind in (*SENDS, *RECEIVES)]
    for action in ends:
        assert peer(peer(action)) == action and channel_of(schedule, peer(action)) == channel_of(schedule, action)
    pairs = [(0, 1), (1, 0), (1, 2), (2, 1)]
    assert channels_of(schedule) == {Channel(*pair, way) for pair in pairs for way in ("forward", "backward")}


def test_routes_of_a_chain() -> None:
    schedule = build_schedule("1f1b", 3, 2)
    send = output_of(parse_action("1F0"))
    assert (str(send), str(peer(send)), channel_of(schedule, send)) == ("1SEND_F0", "2RECV_F0", (1, 2, "forward"))
    assert peer(send) == input_of(parse_action("2F0"))
    for backward in ("1B1", "1I1"):
        send = output_of(parse_action(backward))
        assert (str(send), channel_of(schedule, send)) == ("1SEND_B1", (1, 0, "backward"))
        assert peer(send) == input_of(parse_action("0I1"))

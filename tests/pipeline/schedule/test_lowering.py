"""Start here when a lowered schedule gathers weights (UNSHARD, RESHARD) too often, too late, or too many at once."""

from dataclasses import replace

import pytest

from fused_megatron.checks import InputError
from fused_megatron.pipeline import SCHEDULES, Kind, Schedule, build_schedule, lower, schedule_findings
from fused_megatron.pipeline.schedule.action import Action

SYNCHRONOUS = [name for name, kind in SCHEDULES.items() if kind.weights == "synchronous"]
GATHERS = (Kind.UNSHARD, Kind.RESHARD)


def most_whole(schedule: Schedule) -> list[int]:
    """Return for each rank the most stages with full weights at once."""
    peaks = []
    for actions in schedule.actions:
        whole, peak = 0, 0
        for action in actions:
            whole += (action.kind == Kind.UNSHARD) - (action.kind == Kind.RESHARD)
            peak = max(peak, whole)
        assert whole == 0
        peaks.append(peak)
    return peaks


def gathers(schedule: Schedule) -> list[str]:
    """Return the computations of each rank as text: a letter for a run of one stage, UNSHARD as `(`, RESHARD as `)`."""
    marks = {Kind.UNSHARD: "(", Kind.RESHARD: ")"}
    rows = []
    for actions in schedule.actions:
        row = ""
        for action in actions:
            if action.kind in GATHERS:
                row += f"{action.stage}{marks[action.kind]} "
            elif action.kind in "FB" and not row.endswith(f"{action.stage}{action.kind} "):
                row += f"{action.stage}{action.kind} "
        rows.append(row.strip())
    return rows


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_every_schedule_keeps_the_rules_and_the_limit(name: str) -> None:
    per_rank = SCHEDULES[name].stages_per_rank or 3
    schedule = build_schedule(name, 3, 5, per_rank)
    plain = lower(schedule)
    for limit in range(1, per_rank + 2):
        sharded = lower(schedule, max_unsharded=limit)
        assert schedule_findings(sharded) == []
        assert most_whole(sharded) == [min(limit, per_rank)] * 3
        # The other actions stay in order.
        without = tuple(tuple(a for a in actions if a.kind not in GATHERS) for actions in sharded.actions)
        assert without == plain.actions


def test_breadth_first_gathers_each_stage_once_a_pass() -> None:
    schedule = build_schedule("looped_breadth_first", 1, 4, 3)
    assert gathers(lower(schedule, max_unsharded=1)) == ["0( 0F 0) 1( 1F 1) 2( 2F 2B 2) 1( 1B 1) 0( 0B 0)"]
    # The stage whose next use is latest is released.
    assert gathers(lower(schedule, max_unsharded=2)) == ["0( 0F 1( 1F 0) 2( 2F 2B 2) 1B 1) 0( 0B 0)"]
    assert gathers(lower(schedule, max_unsharded=3)) == ["0( 0F 1( 1F 2( 2F 2B 2) 1B 1) 0B 0)"]


def test_a_gather_stands_before_the_receive_and_a_release_behind_the_send() -> None:
    schedule = lower(build_schedule("gpipe", 2, 1), max_unsharded=1)
    assert [" ".join(map(str, actions)) for actions in schedule.actions] == [
        "0UNSHARD 0F0 0SEND_F0 0RECV_B0 0B0 0REDUCE_GRAD 0RESHARD",
        "1UNSHARD 1RECV_F0 1F0 1B0 1SEND_B0 1REDUCE_GRAD 1RESHARD",
    ]


def test_what_cannot_be_sharded_is_refused() -> None:
    with pytest.raises(InputError, match="max_unsharded=0 must be 1 or more"):
        lower(build_schedule("1f1b", 2, 2), max_unsharded=0)
    with pytest.raises(InputError, match="needs a synchronous schedule, which pipedream is not"):
        lower(build_schedule("pipedream", 2, 2, num_steps=2), max_unsharded=1)


def test_receives_stand_in_the_order_in_which_their_channel_sends() -> None:
    """Receive in the order of the sends, also if the receiver uses the messages in another order."""
    forwards = [(Action(0, Kind.FORWARD, m) for m in (0, 1, 2)), (Action(1, Kind.FORWARD, m) for m in (2, 0, 1))]
    backwards = [(Action(0, Kind.BACKWARD, m) for m in (0, 1, 2)), (Action(1, Kind.BACKWARD, m) for m in (0, 1, 2))]
    actions = tuple((*f, *b) for f, b in zip(forwards, backwards, strict=True))
    schedule = replace(build_schedule("gpipe", 2, 3), actions=actions)
    lowered = lower(schedule)
    assert schedule_findings(lowered) == []
    rows = [" ".join(str(action) for action in row) for row in lowered.actions]
    received = [[a.microbatch for a in row if a.kind in (Kind.RECV_F, Kind.RECV_B)] for row in lowered.actions]
    assert received == [[0, 1, 2], [0, 1, 2]], rows
    # All three receives come before the first forward, which needs the last message.
    kinds = [action.kind for action in lowered.actions[1]]
    assert kinds[:4] == [Kind.RECV_F] * 3 + [Kind.FORWARD]

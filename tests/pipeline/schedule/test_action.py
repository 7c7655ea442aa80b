"""Start here when an action prints, parses or counts as another one."""

import csv
import io
import json

import pytest

from fused_megatron.pipeline import Action, Kind, Schedule, build_schedule, parse_action, schedule_findings
from fused_megatron.pipeline.schedule.action import WITHOUT_INDEX


@pytest.mark.parametrize("kind", Kind)
def test_a_kind_is_its_text_everywhere(kind: Kind) -> None:
    action = Action(3, kind, None if kind in WITHOUT_INDEX else 12)
    text = f"3{kind.value}{'' if kind in WITHOUT_INDEX else 12}"
    assert (str(action), f"{action}", parse_action(text)) == (text, text, action)
    assert (str(kind), f"{kind}", json.dumps(kind)) == (kind.value, kind.value, f'"{kind.value}"')
    csv.writer(cell := io.StringIO()).writerow([kind])
    assert cell.getvalue().strip() == kind.value
    assert {kind: 1}[kind.value] == 1 and kind == kind.value


def test_the_index_has_the_name_that_its_kind_says() -> None:
    assert Action(0, Kind.SEND_B, 4).microbatch == 4
    assert Action(0, Kind.REDUCE_TIED, 1).tied_group == 1
    assert Action(0, Kind.UPDATE, 2).update == 2
    for name, action in (
        ("microbatch", Action(0, Kind.REDUCE_TIED, 1)),
        ("microbatch", Action(0, Kind.UPDATE, 2)),
        ("microbatch", Action(0, Kind.REDUCE_GRAD)),
        ("tied_group", Action(0, Kind.FORWARD, 1)),
        ("update", Action(0, Kind.REDUCE_TIED, 1)),
    ):
        with pytest.raises(AssertionError, match=str(action)):
            getattr(action, name)


@pytest.mark.parametrize(("action", "message"), [
    (Action(0, "X", 0), "0X0 has an unknown kind (F, B, I, W, SEND_F"),
    (Action(0, Kind.UPDATE), "0UPDATE has no index"),
    (Action(0, Kind.FORWARD), "0F has no index"),
    (Action(0, Kind.REDUCE_GRAD, 1), "0REDUCE_GRAD1 must have no index"),
], ids=str)  # fmt: skip
def test_an_action_that_is_none_is_a_breach(action: Action, message: str) -> None:
    good = build_schedule("1f1b", 1, 2)
    bad = Schedule("bad", good.placement, 2, ((action, *good.actions[0]),))
    (finding,) = schedule_findings(bad)
    assert (finding.rank, finding.position, finding.rule) == (0, 0, "complete") and message in finding.message

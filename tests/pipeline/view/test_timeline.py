"""Start here when a timeline is drawn wrong as text, SVG or for Perfetto."""

import json
import xml.etree.ElementTree as ET

import pytest

from fused_megatron.pipeline import SCHEDULES, Costs, build_schedule, simulate
from fused_megatron.pipeline.view.timeline import summary, to_perfetto, to_svg, to_text

GOLDEN = {
    "gpipe": """\
rank 0  0F0 0F1 0F2 0F3 .   .   .   .   .   .   0B0 --- 0B1 --- 0B2 --- 0B3 ---
rank 1  .   1F0 1F1 1F2 1F3 .   .   .   1B0 --- 1B1 --- 1B2 --- 1B3 --- .   .
rank 2  .   .   2F0 2F1 2F2 2F3 2B0 --- 2B1 --- 2B2 --- 2B3 --- .   .   .   .
""",
    "1f1b": """\
rank 0  0F0 0F1 0F2 .   .   .   .   0B0 --- 0F3 0B1 --- .   0B2 --- .   0B3 ---
rank 1  .   1F0 1F1 .   .   1B0 --- 1F2 1B1 --- 1F3 1B2 --- .   1B3 --- .   .
rank 2  .   .   2F0 2B0 --- 2F1 2B1 --- 2F2 2B2 --- 2F3 2B3 --- .   .   .   .
""",
    "interleaved_1f1b": """\
rank 0  0F0 0F1 0F2 0F3 3F0 3F1 3F2 3F3 .   .   .   3B0 --- .   3B1 --- .   3B2 --- .   3B3 --- 0B0 --- 0B1 --- 0B2 --- 0B3 ---
rank 1  .   1F0 1F1 1F2 1F3 4F0 4F1 4F2 .   4B0 --- 4F3 4B1 --- .   4B2 --- .   4B3 --- 1B0 --- 1B1 --- 1B2 --- 1B3 --- .   .
rank 2  .   .   2F0 2F1 2F2 2F3 5F0 5B0 --- 5F1 5B1 --- 5F2 5B2 --- 5F3 5B3 --- 2B0 --- 2B1 --- 2B2 --- 2B3 --- .   .   .   .
""",  # noqa: E501
    "looped_breadth_first": """\
rank 0  0F0 0F1 0F2 0F3 3F0 3F1 3F2 3F3 .   .   .   .   .   .   3B0 --- 3B1 --- 3B2 --- 3B3 --- 0B0 --- 0B1 --- 0B2 --- 0B3 ---
rank 1  .   1F0 1F1 1F2 1F3 4F0 4F1 4F2 4F3 .   .   .   4B0 --- 4B1 --- 4B2 --- 4B3 --- 1B0 --- 1B1 --- 1B2 --- 1B3 --- .   .
rank 2  .   .   2F0 2F1 2F2 2F3 5F0 5F1 5F2 5F3 5B0 --- 5B1 --- 5B2 --- 5B3 --- 2B0 --- 2B1 --- 2B2 --- 2B3 --- .   .   .   .
""",  # noqa: E501
    "zb_h1": """\
rank 0  0F0 0F1 0F2 .   .   0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
rank 1  .   1F0 1F1 .   1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
rank 2  .   .   2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3
""",
    "interleaved_zero_bubble": """\
rank 0  0F0 0F1 0F2 0F3 3F0 3F1 3F2 .   .   3I0 3W0 3F3 3I1 3W1 3I2 3W2 3I3 3W3 0I0 0W0 0I1 0W1 0I2 0W2 0I3 0W3
rank 1  .   1F0 1F1 1F2 1F3 4F0 4F1 .   4I0 4F2 4I1 4W0 4F3 4I2 4W1 4I3 4W2 1I0 4W3 1I1 1W0 1I2 1W1 1I3 1W2 1W3
rank 2  .   .   2F0 2F1 2F2 2F3 5F0 5I0 5F1 5I1 5F2 5I2 5W0 5F3 5I3 5W1 2I0 5W2 2I1 5W3 2I2 2W0 2I3 2W1 2W2 2W3
""",
    "zb_v": """\
rank 0  0F0 0F1 0F2 0F3 .   5F0 5I0 5W0 5F1 5I1 5W1 5F2 5I2 5W2 0I0 0W0 5F3 5I3 5W3 0I1 0W1 .   0I2 0W2 0I3 0W3
rank 1  .   1F0 1F1 1F2 4F0 1F3 4F1 4I0 4W0 4F2 4I1 4W1 1I0 1W0 4F3 4I2 4W2 1I1 1W1 4I3 4W3 1I2 .   1I3 1W2 1W3
rank 2  .   .   2F0 3F0 2F1 3F1 2F2 3F2 3I0 3W0 2F3 2I0 2W0 3F3 3I1 3W1 2I1 2W1 3I2 3W2 2I2 3I3 2I3 2W2 3W3 2W3
""",
    "v_half": """\
rank 0  0F0 .   .   .   .   5F0 0F1 5I0 5W0 .   .   5F1 0F2 5I1 0I0 5W1 0W0 5F2 0F3 5I2 0I1 5W2 0W1 5F3 5I3 0I2 5W3 0W2 .   0I3 0W3
rank 1  .   1F0 .   .   4F0 .   .   1F1 4I0 4W0 4F1 .   1I0 1F2 4I1 1W0 4F2 4W1 1I1 1F3 4I2 1W1 4F3 4W2 1I2 4I3 1W2 4W3 1I3 1W3 .
rank 2  .   .   2F0 3F0 .   .   .   .   2F1 3F1 3I0 2I0 3W0 2W0 2F2 3F2 3I1 2I1 3W1 2W1 2F3 3F3 3I2 2I2 3W2 2W2 3I3 2I3 3W3 2W3 .
""",  # noqa: E501
    "dual_pipe_v": """\
rank 0  0F0 0F1 0F2 0F3 .   5F0 5I0 5W0 5F1 5I1 5W1 5F2 5B2 --- 5F3 .   0B0 --- 5B3 --- 0B1 --- .   .   0B2 --- .   .   0I3 0W3
rank 1  .   1F0 1F1 1F2 4F0 1F3 4F1 4I0 4W0 4F2 4B1 --- 4F3 .   1B0 --- 4B2 --- 1B1 --- 4B3 --- 1B2 --- .   .   1B3 --- .   .
rank 2  .   .   2F0 3F0 2F1 3F1 2F2 3F2 2F3 3B0 --- 3F3 2B0 --- 3B1 --- 2B1 --- 3B2 --- 2B2 --- 3B3 --- 2B3 --- .   .   .   .
""",  # noqa: E501
    "pipedream_2bw": """\
rank 0  0F0 0F1 0F2 .   .   .   .   0B0 --- 0F3 0B1 --- 0F4 0B2 --- 0F5 0B3 --- 0F6 0B4 --- 0F7 0B5 --- .   0B6 --- .   0B7 ---
rank 1  .   1F0 1F1 .   .   1B0 --- 1F2 1B1 --- 1F3 1B2 --- 1F4 1B3 --- 1F5 1B4 --- 1F6 1B5 --- 1F7 1B6 --- .   1B7 --- .   .
rank 2  .   .   2F0 2B0 --- 2F1 2B1 --- 2F2 2B2 --- 2F3 2B3 --- 2F4 2B4 --- 2F5 2B5 --- 2F6 2B6 --- 2F7 2B7 --- .   .   .   .
""",  # noqa: E501
    "pipedream": """\
rank 0  0F0 0F1 0F2 .   .   .   .   0B0 --- 0F3 0B1 --- 0F4 0B2 --- 0F5 0B3 --- 0F6 0B4 --- 0F7 0B5 --- .   0B6 --- .   0B7 ---
rank 1  .   1F0 1F1 .   .   1B0 --- 1F2 1B1 --- 1F3 1B2 --- 1F4 1B3 --- 1F5 1B4 --- 1F6 1B5 --- 1F7 1B6 --- .   1B7 --- .   .
rank 2  .   .   2F0 2B0 --- 2F1 2B1 --- 2F2 2B2 --- 2F3 2B3 --- 2F4 2B4 --- 2F5 2B5 --- 2F6 2B6 --- 2F7 2B7 --- .   .   .   .
""",  # noqa: E501
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden_timeline(name: str) -> None:
    steps = 1 if SCHEDULES[name].weights == "synchronous" else 2
    per_rank = SCHEDULES[name].stages_per_rank or 2
    text = to_text(simulate(build_schedule(name, 3, 4, per_rank, steps)))
    assert text == GOLDEN[name]


def test_svg_is_well_formed_and_has_a_box_for_every_action() -> None:
    schedule = build_schedule("zb_v", 4, 8)
    root = ET.fromstring(to_svg(simulate(schedule)))
    titles = [node.text for node in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 1 + sum(map(len, schedule.actions))
    assert "0F0: 0 to 1" in titles


def test_perfetto_shows_timelines_one_below_the_other() -> None:
    timeline = simulate(build_schedule("1f1b", 2, 3))
    slower = simulate(build_schedule("1f1b", 2, 3), Costs(link_latency=0.5))
    events = json.loads(to_perfetto({"predicted": timeline, "measured": slower}))["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["predicted", "measured"]
    boxes = [event for event in events if event["ph"] == "X"]
    assert len(boxes) == 2 * 12 and boxes[0] == {
        "ph": "X", "name": "0F0", "cat": "F", "pid": 0, "tid": 0, "ts": 0.0, "dur": 1000.0,
        "args": {"stage": 0, "microbatch": 0},
    }  # fmt: skip


def test_summary() -> None:
    text = summary(simulate(build_schedule("1f1b", 2, 3)))
    assert text.splitlines()[0] == "makespan 12, bubble 3 (25.0% of it)"
    assert text.splitlines()[3].split() == ["0", "9", "3", "2", "2"]

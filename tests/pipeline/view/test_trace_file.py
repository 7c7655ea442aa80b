"""Start here when a file of timelines cannot be read back, or a damaged one is not refused in one line."""

from pathlib import Path

import pytest

from fused_megatron.checks import InputError
from fused_megatron.pipeline import Costs, build_schedule, simulate
from fused_megatron.pipeline.view.timeline import to_svg_page
from fused_megatron.pipeline.view.trace_file import read_trace, write_trace


def test_round_trip(tmp_path: Path) -> None:
    schedule = build_schedule("zb_v", 2, 3)
    written = {"predicted": simulate(schedule), "measured": simulate(schedule, Costs(link_latency=0.25))}
    write_trace(written, tmp_path / "trace.json")
    found = read_trace(tmp_path / "trace.json")
    assert list(found) == list(written)
    for name, timeline in written.items():
        assert [[e.action for e in row] for row in found[name].events] == [
            [e.action for e in row] for row in timeline.events
        ]
        for ours, theirs in zip(found[name].events, timeline.events, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert one[1:] == pytest.approx(other[1:])


def test_timelines_of_a_page_have_one_scale_of_time() -> None:
    schedule = build_schedule("1f1b", 1, 1)
    page = to_svg_page("a step", {"short": simulate(schedule), "long": simulate(schedule, Costs(2.0, 2.0, 2.0))})
    widths = [float(line.split('width="')[1].split('"')[0]) for line in page.splitlines() if "<title>0F0" in line]
    assert widths == [156.0, 312.0]


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    begin = '{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "a"}}, '
    begin += '{"ph": "M", "name": "thread_name", "pid": 0, "tid": 0, "args": {}}, '
    for content in (
        "[]",
        '{"traceEvents": [{"ph": 3}]}',
        '{"traceEvents": [' + begin + '{"ph": "X", "cat": "Q", "args": {"stage": 0}}]}',
        '{"traceEvents": [' + begin + '{"ph": "X", "cat": "F", "args": {"stage": -1}}]}',
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=r"trace\.json is no trace of timelines: [^\n]+$"):
            read_trace(path)
    with pytest.raises(InputError, match="No such file"):
        read_trace(tmp_path / "absent.json")
    with pytest.raises(InputError, match=r"trace=.*absent"):
        write_trace({}, tmp_path / "absent" / "trace.json")

"""What a person reads at the end of a benchmark."""

from fused_megatron.testing.call_overhead import CallOverhead
from fused_megatron.testing.comparison_table import (
    gpu_table,
    markdown,
    memory_table,
    milliseconds_table,
    one_line,
    overhead_table,
    remarks,
    speed_table,
)  # fmt: skip
from fused_megatron.testing.side_by_side import BOUND, COMPILE, EAGER, OURS, Bars, Comparison
from fused_megatron.testing.traffic import Traffic


def comparison(label="[8]", **changes):
    result = Comparison("gelu", label, "float32", 4_000_000, Bars(eager=2, bound=1.5))
    result.seconds = {OURS: [2e-3] * 3, EAGER: [5e-3] * 3, COMPILE: [3e-3] * 3, BOUND: [1e-3] * 3}
    result.peak_bytes = {OURS: 1_000_000, EAGER: 3_000_000}
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_speed_table_has_ratios_spreads_and_verdicts():
    header, rule, row = speed_table([comparison()])
    assert set(rule) == {"|", "-"} and len(header) == len(rule) == len(row)
    assert cells(row) == [
        "gelu [8]", "float32", "2 [2-2]", "2.50x [2.50-2.50]", "1.50x [1.50-1.50]", "2.00x [2.00-2.00]",
        "eager >= 2x met; bound <= 1.5x MISSED (2)",
    ]  # fmt: skip


def test_what_was_not_measured_is_a_dash():
    empty = comparison(seconds={EAGER: [1e-3]}, faults={OURS: "wrong: output 0 is off by 3.0%"}, peak_bytes={})
    assert cells(speed_table([empty])[2]) == ["gelu [8]", "float32", "wrong", "-", "-", "-", "-"]
    assert cells(memory_table([empty])[2]) == ["gelu [8]", "float32", "-", "-", "-"]
    assert one_line(empty) == "gelu [8] float32: not timed, wrong: output 0 is off by 3.0%"
    assert "MISSED: bound <= 1.5x" in one_line(comparison())


def test_milliseconds_with_and_without_the_default_malloc():
    kept = comparison(default_malloc_ms={OURS: 4.0, EAGER: 1234.0})
    assert cells(milliseconds_table([comparison()], False)[2])[2:] == ["2", "5", "3", "1", "4.0"]
    assert cells(milliseconds_table([kept], True)[2])[2:] == ["2", "5", "3", "1", "4.0", "4", "1234", "-"]


def test_memory_table_has_ours_and_the_unfused():
    traffic = {OURS: Traffic(5_000_000, 1_000_000), EAGER: Traffic(8_000_000, 2_000_000)}
    assert cells(memory_table([comparison(traffic=traffic)])[2])[2:] == ["5.0, 8.0", "1.0, 2.0", "1.0, 3.0"]


def test_gpu_table_has_a_row_a_provider():
    rows = [cells(line) for line in gpu_table([comparison()], ceiling_gb_per_s=8.0)[2:]]
    assert [row[2] for row in rows] == [OURS, EAGER, COMPILE, BOUND]
    assert rows[1][3:] == ["5 / 5 / 5", "1", "10", "3.0", "2.50x [2.50-2.50]"]


def test_remarks_alike_are_said_once():
    missing = {"peer": "not installed"}
    lines = remarks([comparison("[8]", faults=missing), comparison("[9]", faults=missing, notes={EAGER: "inexact"})])
    assert lines == ["peer: not installed [2 cases]", "eager: inexact [gelu [9] float32]"]


def test_overheads():
    rows = overhead_table({"gelu": (CallOverhead([12.0, 13.0], [3.0, 3.0]), 15), "slow": (CallOverhead([30], [3]), 15)})
    assert cells(rows[2]) == ["gelu", "12.0", "3.0", "9.0", "<= 15 us met"]
    assert cells(rows[3])[-1] == "<= 15 us MISSED"


def test_columns_are_as_wide_as_their_widest_cell():
    assert markdown(["a", "bb"], [["ccc", ""]]) == ["| a   | bb |", "|-----|----|", "| ccc |    |"]

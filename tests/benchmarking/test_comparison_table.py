"""Start here when a table at the end of a benchmark shows a wrong or empty cell."""

from fused_megatron.benchmarking.call_overhead import CallOverhead
from fused_megatron.benchmarking.comparison_table import (  # fmt: skip
    breakdown_table,
    limits_table,
    markdown,
    memory_table,
    milliseconds_table,
    one_line,
    overhead_table,
    phases_table,
    provider_table,
    ratio_of,
    remarks,
    scaling_table,
    speed_table,
)
from fused_megatron.benchmarking.report.ceilings import Ceilings
from fused_megatron.benchmarking.side_by_side import BOUND, COMPILE, EAGER, OURS, Bars, Comparison
from fused_megatron.observe.traffic import Traffic


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


def test_a_smoke_run_has_no_verdicts():
    header, _, row = map(cells, speed_table([comparison()], verdicts=False))
    assert header[-1] == "over bound" and row[-1] == "2.00x [2.00-2.00]" and len(row) == len(header)
    assert "MISSED" not in one_line(comparison(), verdicts=False)
    even = comparison(seconds={OURS: [2e-3] * 3, EAGER: [2e-3] * 3})
    assert ratio_of(even, EAGER).endswith("even") and "even" not in ratio_of(even, EAGER, verdicts=False)


def test_milliseconds_with_and_without_the_default_malloc():
    kept = comparison(default_malloc_ms={OURS: 4.0, EAGER: 1234.0})
    assert cells(milliseconds_table([comparison()], False)[2])[2:] == ["2", "5", "3", "1", "4.0"]
    assert cells(milliseconds_table([kept], True)[2])[2:] == ["2", "5", "3", "1", "4.0", "4", "1234", "-"]


def test_memory_table_has_ours_and_the_unfused():
    traffic = {OURS: Traffic(5_000_000, 1_000_000), EAGER: Traffic(8_000_000, 2_000_000)}
    assert cells(memory_table([comparison(traffic=traffic)])[2])[2:] == ["5.0, 8.0", "1.0, 2.0", "1.0, 3.0"]


def test_provider_table_has_a_row_a_provider_and_no_empty_column():
    header, _, *rows = map(cells, provider_table([comparison()], Ceilings({"copy_gb_per_s": 8.0})))
    assert header[2:] == ["provider", "ms [20-80 %]", "ours is faster", "GB/s", "% of roof", "peak MB"]
    assert [row[2] for row in rows] == [OURS, EAGER, COMPILE, BOUND]
    assert rows[1][3:] == ["5 [5-5]", "2.50x [2.50-2.50]", "1", "10%", "3.0"]
    assert rows[2][4] == "1.50x [1.50-1.50] best other"


def training_step(ranks=2, seconds=0.5):
    known = {"ranks": ranks, "tokens": 1000, "model_flops": 3_000_000_000, "hardware_flops": 4_000_000_000}
    breakdown = {OURS: {"compute": 0.3, "bubble": 0.1}, "DTensor": {"compute": 0.5, "communication": 0.5}}
    times = {OURS: [seconds] * 3, "DTensor": [1.02 * seconds] * 3}
    return Comparison("GPT", f"tp={ranks}", "float32", None, Bars(best=1.3), times, breakdown=breakdown, **known)


def test_a_training_step_has_tokens_and_shares_of_the_ranks_products():
    ceilings = Ceilings({"gemm_gflop_per_s float32": 10.0})
    header, _, ours, theirs = map(cells, provider_table([training_step()], ceilings))
    assert header[3:] == ["tokens/s", "ms [20-80 %]", "ours is faster", "GFLOP/s a rank", "MFU", "HFU"]
    # 3 GFLOP in half a second are 6 GFLOP/s, of 2 x 10.
    assert ours[3:] == ["2,000", "500 [500-500]", "-", "3.0", "30.0%", "40.0%"]
    assert theirs[5] == "1.02x [1.02-1.02] even"


def test_breakdown_has_every_part_and_its_share():
    header, _, ours, theirs = map(cells, breakdown_table([training_step()]))
    assert header[2:] == ["provider", "compute ms", "bubble ms", "communication ms", "sum ms", "step ms"]
    assert ours[2:] == [OURS, "300 (75%)", "100 (25%)", "-", "400", "500"]
    assert theirs[3:] == ["500 (50%)", "-", "500 (50%)", "1000", "510"]


def test_scaling_is_beside_the_smallest_case():
    rows = [cells(line) for line in scaling_table([training_step(2, 0.5), training_step(1, 0.5)])[2:]]
    assert rows == [
        ["GPT tp=1", "1", "2,000", "2,000", "6.0", "100%"],
        ["GPT tp=2", "2", "2,000", "1,000", "3.0", "50%"],
    ]


def test_limits_are_the_lower_of_copy_and_product():
    ceilings = Ceilings({"copy_gb_per_s": 8.0, "gemm_gflop_per_s float32": 10.0})
    copied, product = comparison(model_flops=2_000_000), comparison(model_flops=8_000_000)
    rows = [cells(line) for line in limits_table([copied, product], ceilings)[2:]]
    # 2 ms for 4 MB; half a FLOP a byte: 4 GFLOP/s at most. Two a byte: 16, so the product's 10.
    assert rows[0][2:] == ["2.0", "1.0", "0.50", "copy, 4.0", "25%"]
    assert rows[1][2:] == ["2.0", "4.0", "2.00", "product, 10.0", "40%"]
    assert cells(limits_table([copied], Ceilings({}))[2])[5:] == ["-", "-"]


def test_phases():
    case = comparison(forward_seconds={OURS: [0.5e-3] * 3, EAGER: [1e-3] * 3})
    header, _, row = map(cells, phases_table([case]))
    assert header == ["op", "dtype", OURS, EAGER, COMPILE]
    assert row == ["gelu [8]", "float32", "0.5 + 1.5", "1 + 4", "-"]


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

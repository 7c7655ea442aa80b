"""Start here when docs/kernel_ledger.md is stale, or a kernel exceeds a limit of bytes, spills or access width."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from fused_megatron.audit import cost_table
from fused_megatron.audit.kernels import OPS
from fused_megatron.audit.occupancy import LIMITS

LEDGER = Path(__file__).parents[2] / "docs" / "kernel_ledger.md"
ROW = cost_table.Row(
    "layer_norm", "forward", "kernel", 4096, "bf16", "sm_90a", 40, 0, 1024, 0.5, "128x4 32x1", "128x4", 1.01, 0.0
)
needs_compilers = pytest.mark.skipif(bool(cost_table.what_is_missing()), reason="; ".join(cost_table.what_is_missing()))


def but(**changes):
    return dataclasses.replace(ROW, **changes)


def test_limits():
    assert ROW.faults() == [] and cost_table.exceeded_limits([ROW]) == []
    assert but(spilled_bytes=8).faults() == ["8 bytes spilled"]
    assert but(load_bits="64x2").faults() == ["loads of 64 bits"]
    assert but(store_bits="32x2").faults() == ["stores of 32 bits"]
    assert but(kernel="finish_column_sums<8>", store_bits="32x2").faults() == []
    assert but(ratio=1.03).faults() == ["1.030 times the bytes that must move (limit 1.02)"]
    assert but(ratio=1.035, partials=0.018).faults() == []
    assert but(ratio=1.035, partials=0.025).faults() == ["partial sums take 2.5% (limit 2%)"]
    assert but(instructions=20.0, bytes=4.0, limit=20.0).faults() == []
    assert but(instructions=20.1, bytes=4.0, limit=20.0).faults() == ["20.1 instructions an element (limit 20)"]
    assert but(limit=20.0).faults() == ["- instructions an element (limit 20)"]
    broken = but(ratio=1.03)
    assert len(cost_table.exceeded_limits([broken])) == 1
    known = dataclasses.replace(broken, known="the reason")
    assert cost_table.exceeded_limits([known]) == [] and cost_table.known_faults([known])[0].endswith("the reason")


def test_table():
    rows = [but(arch="sm_80", registers=38), ROW, but(arch="sm_100a"), but(width=8192)]
    lines = cost_table.parsed("# Title\n\n" + cost_table.table(rows))
    assert lines == cost_table.lines(rows) and len(lines) == 2
    assert "38 / 40 / 40" in lines[0]
    assert cost_table.of_arch(lines[0], 1) == cost_table.lines([ROW])[0]


def test_issue_slots():
    # The work of 128 lanes in a clock, against the bytes of a clock: 21 instructions for 4 bytes.
    rows = [but(arch=arch, instructions=21.0, bytes=4.0) for arch in LIMITS]
    assert [round(share, 2) for row in rows for share in row.issue_slots] == [0.55, 0.59, 0.85, 1.2]
    (line,) = cost_table.lines(rows)
    assert line[-2:] == ("21.0", "0.55 / 0.59, 0.85 / 1.20")
    assert cost_table.of_arch(line, 1)[-2:] == ("21.0", "0.59, 0.85")
    assert cost_table.lines([ROW])[0][-2:] == ("-", "-")


def test_every_limit_of_instructions_is_of_a_step_that_exists():
    for name, op in OPS.items():
        if op.instructions:
            steps = [step.name for step in op.steps(2, 1024, torch.bfloat16)]
            assert set(op.instructions) <= set(steps), name


def ledger():
    if not LEDGER.exists():
        pytest.skip("no ledger: make it with fused-megatron audit --write docs/kernel_ledger.md")
    return LEDGER.read_text()


@needs_compilers
def test_the_ledger_has_these_compilers_and_ops():
    text = ledger()
    if cost_table.versions() not in text:
        pytest.skip(f"the ledger was made with other compilers than {cost_table.versions()}")
    assert {line[0] for line in cost_table.parsed(text)} == set(OPS)


def test_the_ledger_keeps_the_limits_of_instructions():
    """Also where a kernel may exceed another limit for a known reason."""
    found = set()
    for line in cost_table.parsed(ledger()):
        op, step, kernel, _, dtype = line[:5]
        limit = OPS[op].instructions.get(step)
        if limit is not None and dtype == "bf16" and "finish" not in kernel:
            found.add((op, step))
            assert float(cost_table.of_arch(line, list(LIMITS).index("sm_90a"))[13]) <= limit, line
    assert found == {(name, step) for name, op in OPS.items() for step in op.instructions}


def compare_with_ledger(cases, arch):
    text = ledger()
    rows = cost_table.audit(cases, [arch])
    assert cost_table.exceeded_limits(rows) == []
    if cost_table.versions() not in text:
        pytest.skip(f"the ledger was made with other compilers than {cost_table.versions()}")
    archs = re.search(r"Architectures: ([^;]*);", text).group(1).split(" / ")
    kept = {cost_table.of_arch(line, archs.index(arch)) for line in cost_table.parsed(text)}
    stale = [line for line in cost_table.lines(rows) if line not in kept]
    assert not stale, f"stale: make it anew with: fused-megatron audit --write docs/kernel_ledger.md\n{stale}"


@needs_compilers
@pytest.mark.slow  # tests/csrc/test_kernel_resources.py reads every compiled kernel in the fast tests
@pytest.mark.parametrize(
    "kernel",
    [
        ("rms_norm", 4096, "bf16"),
        ("cross_entropy", 32768, "bf16"),
    ],
    ids=["cuda", "triton"],
)
def test_the_ledger_is_right_for_some_kernels(kernel):
    compare_with_ledger([kernel], "sm_90a")


@needs_compilers
@pytest.mark.slow
@pytest.mark.parametrize("arch", LIMITS)
def test_the_ledger_is_right_for_all_kernels(arch):
    compare_with_ledger(cost_table.cases(), arch)

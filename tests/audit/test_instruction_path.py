"""Start here when an instruction count of the kernel ledger looks wrong."""

import pytest

from fused_megatron.audit import instruction_path
from fused_megatron.audit.instruction_path import InstructionPath, instructions_per_element, main_paths


def listing(*lines):
    """Return the lines as cuobjdump prints them, at addresses 0x0000, 0x0010, .."""
    code = "\t/* 0x000fe20000000f00 */"
    return "\t\tFunction : kernel\n" + "\n".join(
        f"        /*{16 * i:04x}*/  {line} ;  {code}\n{code}" for i, line in enumerate(lines)
    )


LOOP = listing(
    "S2R R2, SR_TID.X",
    "LDG.E.128 R4, desc[UR4][R2.64]",  # 0x10: a parameter, before the loop
    "FADD R4, R4, R5",
    "LDG.E.128 R8, desc[UR4][R2.64]",  # 0x30: the loop begins
    "@!P0 BRA 0x0070",  # over an optional stream
    "LDG.E.128.CONSTANT R12, desc[UR4][R2.64]",
    "FADD R8, R8, R12",
    "FFMA R8, R8, R4, R5",  # 0x70
    "@P1 BRA 0x00a0",  # over the exact form of an operation
    "CALL.REL.NOINC 0x00d0",
    "STG.E.128 desc[UR4][R2.64], R8",  # 0xa0
    "@P2 BRA 0x0030",
    "EXIT",
    "FMUL R9, R9, R9",  # 0xd0: the subroutine
    "RET.REL.NODEC R10 0x0",
)


def test_the_loop_with_and_without_its_optional_stream():
    assert sorted(main_paths(LOOP), key=lambda path: path.loaded) == [
        InstructionPath(6, 16, 16),
        InstructionPath(8, 32, 16),
    ]
    # 16 bits in, 16 bits out: an access has 8 elements. The optional stream doubles what is read.
    assert instructions_per_element(main_paths(LOOP), 2.0, 2.0) == 6 / 8
    assert instructions_per_element(main_paths(LOOP), 4.0, 2.0) == 8 / 8
    # A few bytes a row besides the streams do not matter; other streams do.
    assert instructions_per_element(main_paths(LOOP), 2.01, 2.02) == 6 / 8
    assert instructions_per_element(main_paths(LOOP), 8.0, 2.0) is None
    assert instructions_per_element(main_paths(LOOP), 0.0, 0.0) is None


def test_elements_of_a_thread_choose_the_path():
    paths = [InstructionPath(100, 32, 64), InstructionPath(90, 16, 64), InstructionPath(200, 64, 64)]
    # Stores that a predicate switches off are on the path; loads below the need are not enough.
    assert instructions_per_element(paths, 2.0, 2.0, 16) == 100 / 16
    assert instructions_per_element(paths, 2.0, 2.0, 32) == 200 / 32
    assert instructions_per_element(paths, 2.0, 2.0, 64) is None


def test_a_kernel_without_a_loop_is_one_path():
    text = listing(
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "@P0 EXIT",
        "FADD R4, R4, R5",
        "STG.E.64 desc[UR4][R2.64], R4",
        "EXIT",
        "BRA 0x0050",
    )
    assert InstructionPath(5, 16, 8) in main_paths(text)
    assert instructions_per_element(main_paths(text), 4.0, 2.0) == 5 / 4


def test_a_loop_that_only_requests_rows_is_not_the_main_loop():
    text = listing(
        "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
        "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
        "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
        "@P0 BRA 0x0000",
        "BRX R56 -0x50",  # 0x40: a jump table
        "FADD R1, R1, R2",
        "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
        "STG.E.128 desc[UR4][R2.64], R4",
        "@!P3 BRA 0x0040",
        "EXIT",
    )
    assert main_paths(text) == [InstructionPath(5, 16, 16)]


@pytest.mark.parametrize("branch", ["BRA 0x0010", "@P0 BRA 0x0010", "BRA.DIV UR4, 0x0010", "BRA P0, 0x0010"])
def test_branches(branch):
    first, second, *_ = instruction_path.parsed(listing("NOP", branch, "EXIT"))
    assert (first.target, second.target, second.address) == (None, 16, 16)
    assert second.is_conditional == (branch != "BRA 0x0010")


def test_only_the_first_of_equal_listings_counts():
    assert main_paths(LOOP + LOOP) == main_paths(LOOP)

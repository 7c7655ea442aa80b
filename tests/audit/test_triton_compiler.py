"""Start here when the audit counts wrong registers, spills or accesses of a Triton kernel."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl

from fused_megatron.audit.triton_compiler import compile_for


@triton.jit
def _double(source, result, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(result + offsets, tl.load(source + offsets) * 2.0)


@triton.jit
def _normalised(source, result, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(source + rows[:, None] * COLUMNS + columns[None, :])
    tl.debug_barrier()  # all of x is in registers here
    tl.store(result + rows[:, None] * COLUMNS + columns[None, :], x / tl.sum(x))


@pytest.fixture(autouse=True)
def _quiet_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # silences a warning


@pytest.mark.parametrize("arch", [80, 100])
def test_width_of_accesses(arch: int) -> None:
    signature = {"source": "*fp32", "result": "*fp32"}
    wide = compile_for(_double, arch, signature, {"BLOCK": 512}, ("source", "result"), 4)
    assert wide.global_accesses == ("ld.v4.b32", "st.v4.b32")
    narrow = compile_for(_double, arch, signature, {"BLOCK": 512}, ("result",), 4)
    assert narrow.global_accesses == ("ld.b32",) * 4 + ("st.v4.b32",)
    assert 0 < wide.registers <= narrow.registers and wide.spill_bytes == 0


def test_spills_and_shared_memory_are_counted() -> None:
    signature = {"source": "*fp32", "result": "*fp32"}
    # 32 KiB of values in one warp: 256 for each thread, which has at most 255 registers.
    compiled = compile_for(_normalised, 80, signature, {"ROWS": 32, "COLUMNS": 256}, ("source", "result"), 1)
    assert compiled.spill_bytes > 0
    spread = compile_for(_normalised, 80, signature, {"ROWS": 32, "COLUMNS": 256}, ("source", "result"), 8)
    assert spread.spill_bytes == 0 and spread.shared_bytes > 0 and 0 < spread.registers <= 255

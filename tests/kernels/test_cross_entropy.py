"""Start here when compiled cross-entropy kernels have narrow accesses or spills."""

import itertools
import os
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fused_megatron.audit.instruction_path import under_loads
from fused_megatron.audit.machine_code import tool
from fused_megatron.audit.occupancy import occupancy
from fused_megatron.audit.triton_compiler import CompiledKernel, compile_for
from fused_megatron.kernels import cross_entropy as kernels

_POINTERS = {"target_ptr": "*i64", "stats_ptr": "*fp32", "grad_loss_ptr": "*fp32", "lse_ptr": "*fp32"}
_FLOATS = ("label_smoothing", "z_loss", "softcap")


@pytest.fixture(autouse=True)
def _quiet_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as in the launches; silences a warning
    assert os.environ.get("TRITON_INTERPRET") != "1"


def _compiled(kernel: str, dtype: str, arch: int, softcap: bool, plain: bool = False) -> CompiledKernel:
    """Compile for rows that begin anywhere: no size is a multiple of 16. plain: without smoothing, at 16 bytes."""
    constexprs = {"SMOOTHING": not plain, "SOFTCAP": softcap, "SPLIT": True, "SHIFTED": not plain, "SAME_SHIFT": True}
    constexprs |= {"LANES": kernels._LANES, "VECTOR": 4 if dtype == "fp32" else 8}
    function = getattr(kernels, kernel)
    constexprs = {name: value for name, value in constexprs.items() if name in function.arg_names}
    pointers = {**_POINTERS, "logits_ptr": f"*{dtype}", "dlogits_ptr": f"*{dtype}"}
    signature = {
        name: pointers.get(name, "fp32" if name in _FLOATS else "i64" if name.endswith("stride") else "i32")
        for name in function.arg_names
        if name not in constexprs
    }
    aligned = tuple(name for name in pointers if name in signature)
    maxnreg = kernels._registers(not plain, softcap) if kernel == "_statistics_kernel" else None
    warps = kernels._OPTIONS["num_warps"]
    return compile_for(function, arch, signature, constexprs, aligned, warps, maxnreg=maxnreg)


# The other combinations are marked slow.
QUICK = [("bf16", 90, False), ("fp32", 80, True)]
FORMS = [
    form if form in QUICK else pytest.param(*form, marks=pytest.mark.slow)
    for form in itertools.product(("bf16", "fp32"), (80, 90, 100), (False, True))
]


@pytest.mark.parametrize("dtype,arch,softcap", FORMS)
def test_compiled_statistics(dtype: str, arch: int, softcap: bool) -> None:
    compiled = _compiled("_statistics_kernel", dtype, arch, softcap)
    accesses = Counter(compiled.global_accesses)
    assert accesses["ld.v4.b32"] == 2 + 2  # both loads of the first full tile, and of the next in the loop
    # Accesses of single elements: only for the tiles at the ends of a row, and for the target.
    narrow = 2 * 2 * (4 if dtype == "fp32" else 8)
    assert sum(count for access, count in accesses.items() if access.startswith("ld")) == 4 + narrow + 2
    assert compiled.spill_bytes == 0
    assert compiled.registers <= 80  # 6 programs of 128 threads on a multiprocessor


@pytest.mark.parametrize("plain", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_the_next_tile_is_loaded_under_the_exponentials_of_this_one(dtype: str, arch: int, plain: bool) -> None:
    if tool("cuobjdump") is None:
        pytest.skip("no cuobjdump")
    compiled = _compiled("_statistics_kernel", dtype, arch, softcap=False, plain=plain)
    found = under_loads(compiled.code)
    # With smoothing on sm_80, ptxas places one of the two loads after a third of the exponentials.
    assert found is not None and found >= (1.0 if plain else 0.6)
    assert compiled.spill_bytes == 0
    programs = 10 if plain else 7  # the steps of 48 and 72 registers
    assert occupancy(f"sm_{arch}{'a' if arch >= 90 else ''}", 128, compiled.registers, 16) >= programs * 4 / 64


@pytest.mark.parametrize("dtype,arch,softcap", FORMS)
def test_compiled_gradient(dtype: str, arch: int, softcap: bool) -> None:
    compiled = _compiled("_gradient_kernel", dtype, arch, softcap)
    accesses = Counter(compiled.global_accesses)
    narrow = 2 * (4 if dtype == "fp32" else 8)  # for a tile that is not full
    assert accesses["ld.v4.b32"] == accesses["st.v4.b32"] == 2
    assert sum(count for access, count in accesses.items() if access.startswith("ld")) == 2 + narrow + 4
    assert sum(count for access, count in accesses.items() if access.startswith("st")) == 2 + narrow
    assert compiled.spill_bytes == 0
    # 7 programs on a multiprocessor (6 from Triton 3.6): 28 KiB in flight. With a softcap, arithmetic limits, and 5 do.
    assert compiled.registers <= (96 if softcap else 80)


@pytest.mark.parametrize("splits", [False, True])
def test_merge_compiles(splits: bool) -> None:
    pointers = {name: "*fp32" for name in ("stats_ptr", "loss_ptr", "out_ptr")}
    integers = {name: "i32" for name in ("num_rows", "num_shards", "num_columns", "vocab_size", "ignore_index")}
    signature = {**pointers, "target_ptr": "*i64", **integers, "label_smoothing": "fp32", "z_loss": "fp32"}
    compiled = compile_for(kernels._merge_kernel, 90, signature, {"SPLITS": splits, "BLOCK": 128}, (), 4)
    assert compiled.spill_bytes == 0

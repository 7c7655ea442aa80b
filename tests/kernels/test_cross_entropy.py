"""Start here when compiled cross-entropy kernels have narrow accesses or spills."""

import itertools
import os
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fused_megatron.audit.triton_compiler import CompiledKernel, compile_for
from fused_megatron.kernels import cross_entropy as kernels

_POINTERS = {"target_ptr": "*i64", "stats_ptr": "*fp32", "grad_loss_ptr": "*fp32", "lse_ptr": "*fp32"}
_FLOATS = ("label_smoothing", "z_loss", "softcap")


@pytest.fixture(autouse=True)
def _quiet_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as in the launches; silences a warning
    assert os.environ.get("TRITON_INTERPRET") != "1"


def _compiled(kernel: str, dtype: str, arch: int, softcap: bool) -> CompiledKernel:
    """Compile for rows that begin anywhere: no size is a multiple of 16."""
    constexprs = {"SMOOTHING": True, "SOFTCAP": softcap, "SPLIT": True, "SHIFTED": True, "SAME_SHIFT": True}
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
    return compile_for(function, arch, signature, constexprs, aligned, kernels._OPTIONS["num_warps"])


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
    assert accesses["ld.v4.b32"] == 2  # both loads of a tile of logits
    # Accesses of single elements: only for a tile that is not full, and for the target.
    narrow = 2 * (4 if dtype == "fp32" else 8)
    assert sum(count for access, count in accesses.items() if access.startswith("ld")) == 2 + narrow + 2
    assert compiled.spill_bytes == 0
    assert compiled.registers <= 80  # 6 programs of 128 threads on a multiprocessor


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

"""The Triton kernels of cross_entropy: values (interpreter, or a GPU), and what the compiler makes of them."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fused_megatron.kernels import cross_entropy as kernels
from fused_megatron.testing.pytest_process import run_tests
from fused_megatron.testing.triton_compiler import CompiledKernel, compile_for

_VALUES = Path(__file__).with_name("interpreted_cross_entropy.py")
_SHARED = {"num_columns": "i32", "num_real": "i32", "vocab_start": "i32", "vocab_size": "i32", "ignore_index": "i32"}
_POINTERS = {"target_ptr": "*i64", "stats_ptr": "*fp32", "grad_loss_ptr": "*fp32", "lse_ptr": "*fp32"}


def test_values_in_the_interpreter() -> None:
    run_tests([_VALUES], {**os.environ, "TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_values_on_a_gpu() -> None:
    assert pytest.main(["-q", "-x", "-p", "no:cacheprovider", str(_VALUES)]) == 0


@pytest.fixture(autouse=True)
def _quiet_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as in the launches; silences a warning
    assert os.environ.get("TRITON_INTERPRET") != "1"


def _compiled(kernel: str, dtype: str, arch: int) -> CompiledKernel:
    constexprs = {"SMOOTHING": True, "LANES": kernels._LANES, "VECTOR": 4 if dtype == "fp32" else 8}
    if kernel == "_statistics_kernel":
        own = {"num_rows": "i32", "label_smoothing": "fp32", "columns_per_split": "i32", "num_splits": "i32"}
        aligned = ("logits_ptr", "stats_ptr", "row_stride", "num_columns", "columns_per_split")
    else:
        own = {"dlogits_ptr": f"*{dtype}", "label_smoothing": "fp32", "z_loss": "fp32", "tiles_per_row": "i32"}
        aligned = ("logits_ptr", "dlogits_ptr", "row_stride", "num_columns")
    # num_real, the true vocabulary, is left unaligned on purpose.
    every = {**_SHARED, **_POINTERS, **own, "logits_ptr": f"*{dtype}", "row_stride": "i64"}
    function = getattr(kernels, kernel)
    signature = {name: every[name] for name in function.arg_names if name in every}
    return compile_for(function, arch, signature, constexprs, aligned, kernels._OPTIONS["num_warps"])


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compiled_statistics(dtype: str, arch: int) -> None:
    compiled = _compiled("_statistics_kernel", dtype, arch)
    accesses = Counter(compiled.global_accesses)
    assert accesses["ld.v4.b32"] == 2  # the logits, both loads of a tile
    assert sum(count for access, count in accesses.items() if access.startswith("ld")) == 4  # and target, and x_target
    assert compiled.spill_bytes == 0
    assert compiled.registers <= 80  # 6 programs of 128 threads on a multiprocessor


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compiled_gradient(dtype: str, arch: int) -> None:
    compiled = _compiled("_gradient_kernel", dtype, arch)
    accesses = Counter(compiled.global_accesses)
    assert accesses["ld.v4.b32"] == 2
    assert sum(count for access, count in accesses.items() if access.startswith("ld")) == 5  # target, lse, grad_loss
    assert {access for access in accesses if access.startswith("st")} == {"st.v4.b32"}
    assert accesses["st.v4.b32"] == 4  # two for the gradient, two for the zeros of an ignored token
    assert compiled.spill_bytes == 0
    assert compiled.registers <= 64  # full occupancy but for a half


def test_merge_compiles() -> None:
    pointers = {name: "*fp32" for name in ("stats_ptr", "first_ptr", "second_ptr")}
    integers = {name: "i32" for name in ("num_rows", "num_shards", "out_stride", "ignore_index")}
    signature = {**pointers, "target_ptr": "*i64", **integers, "z_loss": "fp32"}
    compiled = compile_for(kernels._merge_kernel, 90, signature, {"LOSS": True, "BLOCK": 128}, (), 4)
    assert compiled.spill_bytes == 0

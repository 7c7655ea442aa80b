"""Start here when compiled softmax kernels have narrow accesses or spills."""

from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from fused_megatron.audit.triton_compiler import CompiledKernel, compile_for
from fused_megatron.kernels import scaled_masked_softmax as kernels

ARCHITECTURES = [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
_INTEGERS = ("num_rows", "num_queries", "key_units", "window", "heads", "mask_outer", "mask_inner", "mask_query")
_VECTOR = {"bf16": 8, "fp32": 4}


@pytest.fixture(autouse=True)
def _quiet_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as in the launches; silences a warning


def _compiled(
    kernel: str, dtype: str, arch: int, num_keys: int, *, has_mask: bool = False, rows: int = 1
) -> CompiledKernel:
    """Compile as launched: causal with a window, or heads that share a mask; num_keys a multiple of 16 bytes."""
    function = getattr(kernels, kernel)
    pointers = {name: f"*{dtype}" for name in ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr")}
    every = {**pointers, "mask_ptr": "*u8" if has_mask else f"*{dtype}", "scale": "fp32"}
    every |= dict.fromkeys(_INTEGERS, "i32")
    form = {"CAUSAL": True, "WINDOW": True, "HAS_MASK": has_mask, "SHARED": rows > 1, "ALIGN": _VECTOR[dtype]}
    form |= {"MASK_ALIGN": 16, "mask_key": 1, "ROWS": rows, "LANES": kernels._LANES, "VECTOR": _VECTOR[dtype]}
    form["BLOCK"] = triton.next_power_of_2(num_keys)
    options = kernels._options(rows * form["BLOCK"]) if "BLOCK" in function.arg_names else {"num_warps": 8}
    constexprs = {name: value for name, value in form.items() if name in function.arg_names}
    signature = {name: every[name] for name in function.arg_names if name in every}
    aligned = tuple(name for name in signature if name.endswith("_ptr"))
    return compile_for(function, arch, signature, constexprs, aligned, options["num_warps"], options.get("num_ctas", 1))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "accesses"), [("bf16", 4), pytest.param("fp32", 8, marks=pytest.mark.slow)])
def test_forward(dtype: str, accesses: int, arch: int) -> None:
    compiled = _compiled("_forward_kernel", dtype, arch, 16384, has_mask=True)
    counts = Counter(compiled.global_accesses)
    # num_keys is not a multiple of 16 elements, window and diagonal begin anywhere: accesses are still wide.
    assert counts["ld.v4.b32"] == counts["st.v4.b32"] == accesses
    assert counts["ld.v2.b32"] + counts["ld.b32"] == accesses  # the mask: a byte for each key of a thread's vector
    assert counts.total() == 3 * accesses
    assert compiled.spill_bytes == 0
    # Two programs of 512 threads fit on a multiprocessor; with older compilers, one.
    assert compiled.registers <= (64 if kernels._CLUSTERS else 96)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_heads_that_share_a_mask(arch: int) -> None:
    compiled = _compiled("_forward_kernel", "bf16", arch, 1024, has_mask=True, rows=16)
    counts = Counter(compiled.global_accesses)
    assert counts["ld.v4.b32"] == counts["st.v4.b32"] == 4
    assert counts["ld.b16"] == 1 and counts.total() == 9  # 512 threads read the mask's 1024 bytes once
    assert compiled.spill_bytes == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("num_keys", [pytest.param(4096, marks=pytest.mark.slow), 16384])
def test_backward(num_keys: int, arch: int) -> None:
    compiled = _compiled("_backward_kernel", "bf16", arch, num_keys)
    assert Counter(compiled.global_accesses) == {"ld.v4.b32": 8, "st.v4.b32": 4}
    assert compiled.spill_bytes == 0
    assert compiled.registers <= 128


@pytest.mark.skipif(not kernels._CLUSTERS, reason="Triton before 3.9 does not compile it")
@pytest.mark.parametrize("arch", ARCHITECTURES[1:])
def test_rows_over_a_cluster(arch: int) -> None:
    compiled = _compiled("_backward_kernel", "bf16", arch, kernels._ROW_LIMIT * kernels._CLUSTER_LIMIT)
    assert Counter(compiled.global_accesses) == {"ld.v4.b32": 8, "st.v4.b32": 4}
    assert compiled.spill_bytes == 0


@pytest.mark.parametrize("kernel", ["_long_forward_kernel", "_long_backward_kernel"])
def test_rows_that_are_read_twice(kernel: str) -> None:
    compiled = _compiled(kernel, "bf16", 80, 10**6)
    assert set(compiled.global_accesses) == {"ld.v4.b32", "st.v4.b32"}
    assert compiled.spill_bytes == 0
    assert compiled.registers <= 64


def test_rows_per_program() -> None:
    assert kernels._options(4096)["num_warps"] == 4
    assert kernels._options(16384) == {"num_warps": 16, "enable_fp_fusion": True}
    assert kernels._options(4 * 16384) == {"num_warps": 16, "num_ctas": 4, "enable_fp_fusion": True}
    assert kernels._longest_row(torch.device("cpu")) == kernels._ROW_LIMIT

"""Start here when benchmarks/fused_models.py fails, or docs/results.md lacks its table."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

from fused_megatron.benchmarking.timing_devices import CpuDevice

ROOT = Path(__file__).parents[1]


def test_a_model_is_measured_beside_eager():
    spec = importlib.util.spec_from_file_location("fused_models", ROOT / "benchmarks" / "fused_models.py")
    assert spec is not None and spec.loader is not None
    file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file)
    options = SimpleNamespace(quick=True, skip_compile=True, rounds=1)
    cells = file.measured("llama", options, CpuDevice())
    assert cells[0] == "llama" and cells[1].endswith(" ms") and "x [" in cells[2] and len(cells) == len(file.COLUMNS)
    eager, ours = (float(text) for text in cells[5].split(","))
    assert 0 < ours < eager
    assert all(float(text) <= 2 for text in cells[7].split(",")), "more than twice eager's bfloat16 error"

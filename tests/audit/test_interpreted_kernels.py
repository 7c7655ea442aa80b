"""Start here when a Triton kernel gives other values than the CPU's, or depends on the order of its programs."""

import os
from pathlib import Path

import pytest

from fused_megatron.benchmarking.pytest_process import run_tests

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
CASES = [pytest.param(["--cases-per-test=2"], id="some"), pytest.param([], id="all", marks=pytest.mark.slow)]


@pytest.mark.parametrize("options", CASES)
def test_interpreted_triton_kernels(options):
    paths = [ROOT / "tests" / "ops" / f"test_{kernel.stem}.py" for kernel in sorted((ROOT / "kernels").glob("*.py"))]
    assert all(path.exists() for path in paths), "each kernels/<op>.py needs tests/ops/test_<op>.py"
    # Without the compiled library, whose CPU kernels would run instead.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FUSED_MEGATRON_LIBRARY": ""}
    large = ROOT / "tests" / "kernels" / "interpreted_scaled_masked_softmax.py"
    assert run_tests([*paths, large], environment, options=options) > 10 * len(paths)

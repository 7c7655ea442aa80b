"""Start here when a kernel fails with an older release of Triton.

Runs the Triton kernels with the oldest release of Triton that pyproject.toml allows and with the release that torch
pins. All other tests run with the installed release, the newest.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fused_megatron.benchmarking.pytest_process import run_tests

ROOT = Path(__file__).parents[2]
OLDEST = "3.6.0"
PINNED = "3.7.1"  # pinned by the CUDA build of torch 2.13.0


def test_the_oldest_release_is_the_minimum_of_the_package() -> None:
    asked_for = re.search(r'"triton>=([\d.]+);', (ROOT / "pyproject.toml").read_text())
    assert asked_for is not None and f"{asked_for.group(1)}.0" == OLDEST


@pytest.mark.slow
@pytest.mark.parametrize("release", [OLDEST, PINNED])
def test_values_and_code_with(release: str, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*install, f"triton=={release}"], check=True)
    path = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    asked = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    assert subprocess.run(asked, env=environment, capture_output=True, text=True).stdout.strip() == release
    run_tests([ROOT / "tests" / "kernels"], environment, timeout_s=1800)
    interpreted = {**environment, "TRITON_INTERPRET": "1", "FUSED_MEGATRON_LIBRARY": ""}
    ops = [ROOT / "tests" / "ops" / f"test_{kernel.stem}.py" for kernel in sorted((ROOT / "kernels").glob("*.py"))]
    run_tests(ops, interpreted, timeout_s=1800)

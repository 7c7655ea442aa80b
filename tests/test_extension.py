"""Start here when the compiled library is missing, broken or lacks an op."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fused_megatron import extension
from fused_megatron.doctor.device_code import device_code
from fused_megatron.ops.registration import define_op

ROOT = Path(__file__).parents[1]

# Runs ops twice and prints whether the results are right, so that the number of warnings can be counted.
USE_AN_OP = """
import torch
import fused_megatron as fm
x = torch.randn(3, 5)
for _ in range(2):
    y = fm.ops.bias_gelu(x, torch.ones(5))
    squares = [fm.ops.sum_of_squares(tensors).item() for tensors in ([x, x], [])]  # its argument is a list
print(torch.allclose(y, torch.nn.functional.gelu(x + 1, approximate="tanh"), atol=1e-6))
print(abs(squares[0] - 2 * x.square().sum().item()) < 1e-4, squares[1])
"""


def registrations() -> list[tuple[str, str]]:
    """Return (op, dispatch key) of every kernel that the C++ and CUDA sources register."""
    found = []
    for pattern, key in (("*/*_cpu.cpp", "CPU"), ("*/*_cuda.cu", "CUDA")):
        for path in sorted((ROOT / "csrc").glob(pattern)):
            found += [(name, key) for name in re.findall(r'm\.impl\(\s*"(\w+)"', path.read_text(encoding="utf-8"))]
    return found


@pytest.mark.parametrize(("op", "key"), registrations())
def test_kernel_is_registered(op, key):
    if not extension.LIBRARY.exists():
        pytest.skip("the compiled library is not built")
    # CI asks for the CUDA kernels: there, none may be missing.
    if key == "CUDA" and os.environ.get("FUSED_MEGATRON_CUDA") != "on" and not device_code(extension.LIBRARY):
        pytest.skip("the library has no CUDA kernels (to compile and test them: FUSED_MEGATRON_CUDA=on make test)")
    assert extension.load_library()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_megatron::{op}", key)


def python_files_alone(folder: Path) -> Path:
    """Copy the package as an install without a compiler leaves it."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "kernels")
    shutil.copytree(ROOT / "fused_megatron", folder / "fused_megatron", ignore=ignore)
    shutil.copytree(ROOT / "kernels", folder / "fused_megatron" / "kernels")
    return folder


def use_an_op(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    return subprocess.run(
        [sys.executable, "-c", USE_AN_OP], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def test_without_the_library_ops_run_and_warn_once(tmp_path):
    ran = use_an_op(python_files_alone(tmp_path), LOCAL_RANK="0")
    assert ran.stdout == "True\nTrue 0.0\n", ran.stderr
    assert ran.stderr.count("RuntimeWarning") == 1
    assert "the compiled library is not built; all ops run on their slower PyTorch reference" in ran.stderr
    assert "To build it: pip install" in ran.stderr


def test_a_broken_library_is_one_warning(tmp_path):
    folder = python_files_alone(tmp_path)
    (folder / "fused_megatron" / "_torch_ops.so").write_bytes(b"\x7fELF, but cut short")
    ran = use_an_op(folder)
    assert ran.stdout == "True\nTrue 0.0\n", ran.stderr
    assert ran.stderr.count("RuntimeWarning") == 1
    assert "the compiled library does not load" in ran.stderr


@pytest.mark.slow
def test_one_rank_of_a_machine_speaks_for_all(tmp_path):
    ran = use_an_op(python_files_alone(tmp_path), LOCAL_RANK="1")
    assert (ran.stdout, ran.stderr) == ("True\nTrue 0.0\n", "")


def test_an_op_on_a_list_of_tensors_runs_without_a_kernel() -> None:
    """The device of its warning is looked for in the list: a tree without compiled parts could not sum gradients."""
    op = define_op(
        "sum_of_a_list_in_a_test(Tensor[] parts) -> Tensor",
        reference=lambda parts: torch.stack(parts).sum(dim=0),
        fake=lambda parts: torch.empty_like(parts[0]),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert op([torch.ones(2), torch.full((2,), 2.0)]).tolist() == [3.0, 3.0]

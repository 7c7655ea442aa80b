"""Start here when the CUDA emulation misses a fault of a kernel, or compiles unchanged files again."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest

from fused_megatron.audit import cuda_emulation
from fused_megatron.audit.cuda_emulation import (
    CACHE,
    build_emulation,
    emulated_environment,
    host_compiler,
    sanitizer_libraries,
)
from fused_megatron.benchmarking.pytest_process import run_tests

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(host_compiler() is None, reason="no GCC")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Return a new cache that has only the emulation's machine.cpp, compiled by `make test`."""
    folder = tmp_path_factory.mktemp("emulation")
    for path in CACHE.glob("machine-*.o"):
        shutil.copy2(path, folder)
    return folder


def test_without_the_sources_one_line_says_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_emulation, "CSRC", tmp_path / "absent")  # as in a wheel
    monkeypatch.setattr(sys, "argv", ["emulated", "tests/ops/test_norm.py"])
    with pytest.raises(SystemExit, match=r"^fused-megatron: error: the emulation needs the sources .* not the wheel$"):
        runpy.run_module("fused_megatron.audit.emulated", run_name="__main__")


@pytest.mark.skipif(not sanitizer_libraries(), reason="no libasan")
def test_faults_are_found(cache):
    library = build_emulation([HERE / "faulty_kernels.cu"], cache)
    environment = emulated_environment(library)
    del environment["FUSED_MEGATRON_LIBRARY"]
    run_tests([HERE / "emulated_faults.py"], {**environment, "FAULTY_KERNELS": str(library)})


def test_errors_of_the_compiler_are_shown(tmp_path, cache):
    source = tmp_path / "wrong_cuda.cu"
    source.write_text('#include "cuda/launch.h"\nint f() { return undeclared_name; }\n')
    with pytest.raises(AssertionError, match=r"wrong_cuda.cu:2.*undeclared_name"):
        build_emulation([source], cache)


def test_only_changed_files_are_compiled(tmp_path, cache):
    source = tmp_path / "small_cuda.cu"
    source.write_text("int f() { return 1; }\n")
    first = build_emulation([source], cache)
    times = {path: path.stat().st_mtime_ns for path in cache.glob("*.o")}
    source.write_text("int f() { return 2; }\n")
    assert build_emulation([source], cache) != first
    new = {path: path.stat().st_mtime_ns for path in cache.glob("*.o")}
    assert len(new) == len(times) + 1 and times.items() <= new.items()

"""Start here when a CUDA kernel gives other values than the CPU's, or accesses memory outside its tensors."""

import re
from pathlib import Path

import pytest

from fused_megatron.audit.cuda_emulation import (
    CSRC,
    build_emulation,
    cuda_sources,
    emulated_environment,
    host_compiler,
    sanitizer_libraries,
)
from fused_megatron.benchmarking.pytest_process import run_tests

pytestmark = [
    pytest.mark.skipif(host_compiler() is None, reason="no GCC"),
    pytest.mark.skipif(not sanitizer_libraries(), reason="no libasan"),
]
OP_TESTS = Path(__file__).parents[1] / "ops"
CASES = [pytest.param(["--cases-per-test=2"], id="some"), pytest.param([], id="all", marks=pytest.mark.slow)]


@pytest.mark.parametrize("options", CASES)
def test_emulated_cuda_kernels(options):
    library = build_emulation()
    paths = set()
    for name in (source.parent.name for source in cuda_sources()):
        imported = re.compile(rf"^from fused_megatron\.ops import .*\b{name}\b", re.MULTILINE)
        found = [path for path in OP_TESTS.glob("test_*.py") if imported.search(path.read_text())]
        assert found, f"no file of tests/ops imports {name}"
        paths.update(found)
    paths = sorted(paths)
    assert run_tests(paths, emulated_environment(library), options=options) > 10 * len(paths)


def test_every_kernel_is_registered_and_launched_through_the_wrappers():
    for source in cuda_sources():
        assert "FM_CUDA_LIBRARY_IMPL(m)" in source.read_text(), source
    for file in CSRC.rglob("*.cu*"):
        assert not re.search(r"<<<|__shared__|STD_CUDA_CHECK", file.read_text()), file

"""The tests of the ops again, with the CUDA kernels emulated on the host under AddressSanitizer."""

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


def test_emulated_cuda_kernels():
    library = build_emulation()
    names = [source.parent.name for source in cuda_sources()]
    assert all((OP_TESTS / f"test_{name}.py").exists() for name in names), "each CUDA op needs tests/ops/test_<op>.py"
    paths = sorted({path for name in names for path in OP_TESTS.glob(f"test_{name}*.py")})
    paths.append(OP_TESTS / "test_norm.py")  # what layer_norm and rms_norm have in common
    assert run_tests(paths, emulated_environment(library)) > 20 * len(paths)


def test_every_kernel_is_registered_and_launched_through_the_wrappers():
    for source in cuda_sources():
        assert "FM_CUDA_LIBRARY_IMPL(m)" in source.read_text(), source
    for file in CSRC.rglob("*.cu*"):
        assert not re.search(r"<<<|__shared__|STD_CUDA_CHECK", file.read_text()), file

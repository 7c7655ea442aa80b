"""What ptxas makes of the CUDA kernels: nothing spills."""

import shutil

import pytest

from fused_megatron.testing.cuda_compiler import ptxas_resources
from fused_megatron.testing.cuda_emulation import cuda_sources

ARCHS = ["sm_90a", pytest.param("sm_80", marks=pytest.mark.slow), pytest.param("sm_100a", marks=pytest.mark.slow)]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", cuda_sources(), ids=lambda path: path.parent.name)
def test_no_spills(tmp_path, source, arch):
    kernels = ptxas_resources(source, arch, tmp_path)
    assert kernels
    for kernel in kernels:
        assert kernel.spill_bytes == 0 and kernel.stack_bytes == 0, kernel
        assert kernel.shared_bytes <= 48 * 1024, kernel
        assert 0 < kernel.registers <= 128, kernel

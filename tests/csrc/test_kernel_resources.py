"""Start here when a CUDA kernel spills registers on some architecture."""

import shutil

import pytest

from fused_megatron.audit import machine_code
from fused_megatron.audit.cuda_emulation import cuda_sources
from fused_megatron.audit.occupancy import LIMITS


def assert_nothing_spills(kernels):
    for name, resources in kernels.items():
        assert resources["STACK"] == resources["LOCAL"] == 0, (name, resources)
        assert resources["SHARED"] <= 48 * 1024, (name, resources)
        assert 0 < resources["REG"] <= 128, (name, resources)


@pytest.mark.parametrize("arch", LIMITS)
def test_no_spills_in_the_compiled_library(arch):
    if machine_code.tool("cuobjdump") is None or machine_code.library() is None:
        pytest.skip("no cuobjdump, or the compiled library has no CUDA code of these sources")
    kernels = machine_code.resources_of(machine_code.library(), arch)
    assert len(kernels) > 50
    assert_nothing_spills(kernels)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("source", cuda_sources(), ids=lambda path: path.parent.name)
def test_no_spills_as_compiled_now(source, arch):
    kernels = machine_code.resources_of(machine_code.compiled(source.parent.name, arch), arch)
    assert kernels
    assert_nothing_spills(kernels)

"""Start here when a CUDA kernel spills registers on some architecture, or reads before the kernel before it ended."""

import re
import shutil

import pytest

from fused_megatron.audit import machine_code
from fused_megatron.audit.cuda_emulation import cuda_sources
from fused_megatron.audit.instruction_path import listing
from fused_megatron.audit.occupancy import LIMITS


def assert_nothing_spills(kernels):
    for name, resources in kernels.items():
        assert resources["STACK"] == resources["LOCAL"] == 0, (name, resources)
        assert resources["SHARED"] <= 48 * 1024, (name, resources)
        assert 0 < resources["REG"] <= 128, (name, resources)


def assert_second_kernels_wait(binary, arch):
    """Only a kernel that FM_LAUNCH_AFTER starts waits (ACQBULK), and it does so before its first access."""
    symbols = [name for name in machine_code.resources_of(binary, arch) if "finish_" in name]
    for symbol in symbols:
        code = listing(binary, arch, symbol, str(machine_code.tool("cuobjdump")))
        accesses = re.findall(r"\b(ACQBULK|LDG|STG|LDS|STS)\b", code)
        # A library lists a kernel once for each file that uses it.
        assert accesses.count("ACQBULK") == (0 if arch == "sm_80" else code.count("Function :")), symbol
        assert accesses[0] == ("LDG" if arch == "sm_80" else "ACQBULK"), symbol
    return len(symbols)


@pytest.mark.skipif(machine_code.tool("cuobjdump") is None, reason="no cuobjdump")
@pytest.mark.parametrize("arch", LIMITS)
def test_a_second_kernel_waits_for_the_first(arch):
    if machine_code.library() is not None:
        assert assert_second_kernels_wait(machine_code.library(), arch) == 2
    elif shutil.which("nvcc") is None:
        pytest.skip("no nvcc, and the compiled library has no CUDA code of these sources")
    else:
        assert assert_second_kernels_wait(machine_code.compiled("sum_of_squares", arch), arch) == 1


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
    binary = machine_code.compiled(source.parent.name, arch)
    kernels = machine_code.resources_of(binary, arch)
    assert kernels
    assert_nothing_spills(kernels)
    assert_second_kernels_wait(binary, arch)

"""What ptxas makes of the CUDA kernels: nothing spills, and enough warps fit on a multiprocessor."""

import shutil

import pytest

from fused_megatron.testing.cuda_emulation import ptxas_resources

ARCHS = ["sm_90a", pytest.param("sm_80", marks=pytest.mark.slow), pytest.param("sm_100a", marks=pytest.mark.slow)]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", ["layer_norm", "bias_gelu"])
def test_no_spills(request, tmp_path, op, arch):
    kernels = ptxas_resources(request.path.with_name(f"{op}_emulation.cpp"), arch, tmp_path)
    assert len(kernels) > 20
    for kernel in kernels:
        assert kernel.spill_bytes == 0 and kernel.stack_bytes == 0, kernel
        assert kernel.shared_bytes <= 48 * 1024, kernel
        # A forward or an elementwise kernel keeps about half of the warps resident. The backward of layer norm holds
        # the sums of two gradients in registers instead, and hides latency by loading a row ahead.
        most = 128 if "backward_in_registers" in kernel.name else 72
        assert 0 < kernel.registers <= most, kernel

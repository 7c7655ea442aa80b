"""The emulation computes what a GPU would, and finds what a GPU would leave undefined."""

import ctypes
import os
import signal
import subprocess
import sys

import pytest
import torch

from fused_megatron.testing.cuda_emulation import compile_for_host, host_compiler

pytestmark = pytest.mark.skipif(host_compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def kernels(request, tmp_path_factory):
    source = request.path.parents[1] / "csrc" / "faulty_emulation.cpp"
    return compile_for_host(source, tmp_path_factory.mktemp("emulation"))


def test_shuffles_blocks_and_lanes(kernels):
    out = torch.empty(6)
    for seed in (0, 1, 12):
        kernels.set_order_seed(seed)
        kernels.run_sum(ctypes.c_void_p(out.data_ptr()))
        expected = [(sum(range(w * 32, w * 32 + 32)) + 32 * b) * 100 + 32 for b in range(3) for w in range(2)]
        assert out.tolist() == expected


def test_a_missing_barrier_shows_in_another_order(kernels):
    out = torch.empty(64)

    def run(with_barrier, seed):
        kernels.set_order_seed(seed)
        kernels.run_reverse(ctypes.c_void_p(out.data_ptr()), with_barrier)
        return out.tolist()

    expected = [float(63 - i) for i in range(64)]
    assert run(True, 0) == run(True, 1) == run(True, 20) == expected
    assert run(False, 0) != expected


@pytest.mark.parametrize("barrier,message", [(1, "a __syncthreads that not all"), (0, "a shuffle that not all 32")])
def test_divergence_aborts(kernels, barrier, message):
    code = f"import ctypes; ctypes.CDLL({kernels._name!r}).run_diverge(bool({barrier}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGABRT and message in done.stderr

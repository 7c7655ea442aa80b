"""The same tests of ops wherever they run: CPU kernels, a GPU, emulated CUDA kernels, interpreted Triton kernels.

The last two are started by tests/audit/test_emulated_kernels.py and test_interpreted_kernels.py: there, CPU tensors
are served by the GPU's kernels.
"""

import contextlib
import ctypes
import os
import sys
import zlib

import pytest
import torch

from fused_megatron.audit.cuda_emulation import loaded_emulation
from fused_megatron.audit.triton_interpreter import interpreter

EMULATED = loaded_emulation() is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if EMULATED or INTERPRETED:
    torch.set_num_threads(1)  # the kernels run on one; a second would spin while it waits for torch's own small ops


def pytest_configure(config):
    if EMULATED or INTERPRETED:  # what falls back to the reference would be tested against itself
        config.addinivalue_line("filterwarnings", "error:fused_megatron. no .* kernel for")


def pytest_collection_modifyitems(config, items):
    """Tests of what CPU kernels alone have (threads, large sizes) have no meaning for the others."""
    if not (EMULATED or INTERPRETED):
        return
    left_out = [item for item in items if item.get_closest_marker("cpu_kernel") or item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def devices():
    on_gpu = torch.cuda.is_available() and not (EMULATED or INTERPRETED)
    return ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if on_gpu else [])]


@pytest.fixture(params=devices())
def device(request):
    """The device of a test's tensors."""
    return request.param


@pytest.fixture(autouse=True)
def hostile_machine(request):
    """New memory full of NaN; blocks, threads and programs in an order that only this test has."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it torch.empty fills with NaN
    seed = zlib.crc32(request.node.nodeid.encode())
    if EMULATED:
        loaded_emulation().fm_emulation_set_seed(seed)
    with interpreter(seed) if INTERPRETED else contextlib.nullcontext():
        yield
    torch.use_deterministic_algorithms(False)


if sys.platform == "linux" and not EMULATED:
    # Memory that kernels allocate by themselves: glibc fills it with 0xFE, a huge number in every format but float16's
    # (there NaN). AddressSanitizer's allocator, which the emulation runs with, fills it with NaN.
    _M_PERTURB = -6
    ctypes.CDLL(None).mallopt(_M_PERTURB, 0x01)

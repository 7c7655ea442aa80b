"""Fixtures with which the tests of ops run on CPU kernels, a GPU, emulated CUDA kernels or interpreted Triton kernels.

tests/audit/test_emulated_kernels.py and test_interpreted_kernels.py start the last two: there, the GPU's kernels run on
CPU tensors.
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
    if EMULATED or INTERPRETED:  # a fallback to the reference would be tested against itself
        config.addinivalue_line("filterwarnings", "error:fused_megatron. no .* kernel for")


def pytest_addoption(parser):
    parser.addoption("--cases-per-test", type=int, help="run so many cases of each parametrised test, always the same")


def pytest_collection_modifyitems(config, items):
    """Deselect tests for CPU kernels only (threads, large sizes), and cases beyond --cases-per-test."""
    if not (EMULATED or INTERPRETED):
        return
    left_out = {item for item in items if item.get_closest_marker("cpu_kernel") or item.get_closest_marker("gpu")}
    cases = {}
    for item in items:
        if item not in left_out:
            cases.setdefault((item.path, item.originalname), []).append(item)
    if (wanted := config.getoption("cases_per_test", None)) is not None:
        for found in cases.values():
            # Chosen by the checksum of the name: neighbouring cases differ in only one argument.
            found.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
            left_out.update(found[wanted:])
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def devices():
    on_gpu = torch.cuda.is_available() and not (EMULATED or INTERPRETED)
    return ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if on_gpu else [])]


@pytest.fixture(params=devices())
def device(request):
    """Return the device for a test's tensors."""
    return request.param


@pytest.fixture(autouse=True)
def hostile_machine(request):
    """Fill new memory with NaN, and run blocks, threads and programs in an order of this test's own."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it torch.empty fills with NaN
    seed = zlib.crc32(request.node.nodeid.encode())
    if EMULATED:
        loaded_emulation().fm_emulation_set_seed(seed)
    _fill_new_memory(True)
    with interpreter(seed) if INTERPRETED else contextlib.nullcontext():
        yield
    _fill_new_memory(False)  # other tests may run in this process: filling would cost them minutes
    torch.use_deterministic_algorithms(False)


def _fill_new_memory(on):
    """Memory that kernels allocate by themselves: glibc fills it with 0xFE, a huge number in every format but float16's
    (there NaN). AddressSanitizer's allocator, which the emulation runs with, fills it with NaN by itself."""
    if sys.platform == "linux" and not EMULATED:
        m_perturb = -6
        ctypes.CDLL(None).mallopt(m_perturb, 0x01 if on else 0)

"""Settings that hold for every side of every comparison."""

import ctypes
import platform

import pytest
import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_POOL_BYTES = 2 << 30


def pytest_configure() -> None:
    """Let malloc keep its pages: else faulting fresh ones in, which no kernel can change, is most of what is timed."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
        torch.ones(_POOL_BYTES, dtype=torch.uint8)  # freed at once: pages that every later tensor finds warm


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()

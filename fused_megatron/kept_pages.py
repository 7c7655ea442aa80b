"""Settings that let malloc reuse freed memory: on a CPU, page faults can cost more than the computation."""

import ctypes
import os
import platform

# Parameters of mallopt (malloc.h of glibc).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 << 20

# The same settings as environment variables, for a process that has not started yet.
KEPT_PAGES_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(_TOP_PAD_BYTES),
}


def uses_glibc() -> bool:
    """Return whether this process seems to allocate through glibc."""
    return platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"


def keep_malloc_pages() -> bool:
    """Let malloc keep the memory of freed tensors for later tensors, until the process ends.

    By default glibc returns a large block to the system when it is freed, and every page of the next block faults. With
    these settings the process keeps the memory of its peak. Results do not change by a bit.

    Returns:
        Whether the settings were made. False, without any effect, if malloc is not glibc's (musl, macOS) or if the
        user has set malloc's environment variables.
    """
    if not uses_glibc() or any(name in os.environ for name in KEPT_PAGES_ENVIRONMENT):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # No mmap for large blocks; -1: never trim; the heap grows in large steps, to save system calls.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all([mallopt(name, value) == 1 for name, value in settings])


def release_free_pages() -> None:
    """Return unused memory to the system, once; does nothing if malloc is not glibc's."""
    if uses_glibc():
        ctypes.CDLL(None).malloc_trim(0)

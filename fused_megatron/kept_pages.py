"""A malloc that keeps its pages: on a CPU, faulting in fresh ones can cost more than the work that they are for."""

import ctypes
import os
import platform

# mallopt's names for them (malloc.h of glibc).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 << 20

# The same by the environment, for a process that is yet to start.
KEPT_PAGES_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(_TOP_PAD_BYTES),
}


def uses_glibc() -> bool:
    """Whether this process allocates through glibc, so far as can be told."""
    return platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"


def keep_malloc_pages() -> bool:
    """Let malloc keep the memory of freed tensors for the next ones, from here to the end of the process.

    glibc returns a large block to the system when it is freed, and every page of the next one faults. With this the
    process goes on holding what it needed at its peak. What is computed does not change by a bit.

    Returns:
        Whether it was set. False, and nothing has happened, where malloc is not glibc's (musl, macOS), and where the
        environment gives malloc settings of the user's own.
    """
    if not uses_glibc() or any(name in os.environ for name in KEPT_PAGES_ENVIRONMENT):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # -1 never trims; no mmap even for the largest block; the heap grows in steps that are worth a system call.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all([mallopt(name, value) == 1 for name, value in settings])


def release_free_pages() -> None:
    """Give back what is held but unused, once; nothing where malloc is not glibc's."""
    if uses_glibc():
        ctypes.CDLL(None).malloc_trim(0)

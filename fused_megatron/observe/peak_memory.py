"""Largest memory that this process has held so far."""

import importlib.util
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of torch's memory on a GPU; else the peak of the process's resident memory (0 if unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if importlib.util.find_spec("resource") is None:  # not on every platform
        return 0
    import resource  # noqa: PLC0415 (as above)

    # In KiB on Linux, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""The compiled library: loaded once, and a word to the user where something is slower than it could be."""

import functools
import warnings
from pathlib import Path

import torch

HOW_TO_BUILD = "pip install --no-build-isolation -e . (needs a C++ compiler; CUDA kernels need nvcc as well)"


@functools.cache
def load_library() -> bool:
    """Load the compiled torch library, once; False, with one warning, where there is none that loads."""
    path = Path(__file__).parent / "_torch_ops.so"
    reason = "is not built"
    if path.exists():
        try:
            torch.ops.load_library(path)
            return True
        except OSError as error:  # built for another platform or an older torch
            reason = f"does not load ({error})"
    warnings.warn(
        f"fused_megatron: the compiled library {reason}; all ops run on their slower PyTorch reference. "
        f"To build it: {HOW_TO_BUILD}",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


@functools.cache
def warn_no_kernel(op: str, device_type: str) -> None:
    """Warn, once an op and device, that the reference runs although the library is there."""
    if load_library():
        warnings.warn(
            f"fused_megatron: no {device_type} kernel for {op}; it runs on its slower PyTorch reference. "
            f"To build it: {HOW_TO_BUILD}",
            RuntimeWarning,
            stacklevel=2,
        )

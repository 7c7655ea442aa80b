"""Loading of the compiled library, and the warnings about ops that run without a compiled kernel."""

import functools
import os
import warnings
from pathlib import Path

import torch

HOW_TO_BUILD = "pip install -e . in the source folder (needs a C++20 compiler; CUDA kernels need nvcc as well)"
LIBRARY = Path(__file__).parent / "_torch_ops.so"


@functools.cache
def load_library() -> bool:
    """Load the compiled torch library, once; if there is none that loads, warn once and return False.

    The environment variable FUSED_MEGATRON_LIBRARY replaces its path (for example by the emulated CUDA kernels); an
    empty value switches the library off.
    """
    chosen = os.environ.get("FUSED_MEGATRON_LIBRARY")
    library = LIBRARY if chosen is None else Path(chosen)
    reason = "is not built" if chosen is None else f"FUSED_MEGATRON_LIBRARY={chosen} does not exist"
    if chosen == "":
        reason = "is switched off (FUSED_MEGATRON_LIBRARY is empty)"
    elif library.exists():
        try:
            torch.ops.load_library(library)
            return True
        except OSError as error:  # damaged, or built for another platform or a newer torch
            reason = f"does not load ({error})"
    _warn(f"the compiled library {reason}; all ops run on their slower PyTorch reference.")
    return False


@functools.cache
def warn_no_kernel(op: str, device_type: str, way: str | None = None) -> None:
    """Warn once per op and device that the reference runs, because the loaded library has no kernel for it.

    Args:
        op: its name.
        device_type: "cpu", "cuda".
        way: how to get the kernel; None: build it.
    """
    if load_library():
        _warn(f"no {device_type} kernel for {op}; it runs on its slower PyTorch reference.", way)


def _warn(message: str, way: str | None = None) -> None:
    # All ranks of a machine use the same files, so that one warning per machine is enough.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(
            f"fused_megatron: {message} {way or f'To build it: {HOW_TO_BUILD}'}", RuntimeWarning, stacklevel=4
        )

"""The compiled library: loaded once, and a word to the user where something is slower than it could be."""

import functools
import os
import warnings
from pathlib import Path

import torch

HOW_TO_BUILD = "pip install --no-build-isolation -e . (needs a C++20 compiler; CUDA kernels need nvcc as well)"
LIBRARY = Path(__file__).parent / "_torch_ops.so"


@functools.cache
def load_library() -> bool:
    """Load the compiled torch library, once; False, with one warning, where there is none that loads.

    FUSED_MEGATRON_LIBRARY is the path of another one (such as the emulation of the CUDA kernels); empty for none.
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
def warn_no_kernel(op: str, device_type: str) -> None:
    """Warn, once an op and device, that the reference runs although the library is there."""
    if load_library():
        _warn(f"no {device_type} kernel for {op}; it runs on its slower PyTorch reference.")


def _warn(message: str) -> None:
    # torchrun starts every rank of a machine with the same files: one of them speaks for all.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(f"fused_megatron: {message} To build it: {HOW_TO_BUILD}", RuntimeWarning, stacklevel=4)

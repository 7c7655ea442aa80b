"""The one line for a run whose memory was not enough in the middle of a step."""

import re

import torch

from fused_megatron.checks import first_line

# torch's error of a GPU has a type of its own, and its error of a CPU has not.
_ON_CPU = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
_MOST_CHARACTERS = 200
_WAY_OUT = (
    "a smaller training.microbatch_size, model.recompute='full' or more ranks need less; "
    "fused-megatron dry-run CONFIG says what a step holds"
)


class MemoryShortageError(RuntimeError):
    """A rank got no memory for a tensor. Only this rank raises it; the others lose contact with it."""


def explain_shortage(error: RuntimeError) -> RuntimeError:
    """Return a MemoryShortageError if a tensor got no memory, else the error itself."""
    if isinstance(error, torch.OutOfMemoryError):
        found = first_line(error, name_type=False)[:_MOST_CHARACTERS]
    elif (on_cpu := _ON_CPU.search(str(error))) is not None:
        found = f"no {int(on_cpu[1]) / 1e9:.3g} GB for a tensor"
    else:
        return error
    return MemoryShortageError(f"out of memory: {found} ({_WAY_OUT})")

"""The compiled builders of the sample index (csrc/host/dataset_index.cpp), called by ctypes.

The functions have the arguments, the results and the errors of fused_megatron.reference.sample_index, bit for bit. They
release the interpreter lock.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np

LIBRARY = Path(__file__).parents[1] / "_dataset_index.so"

_MAX_SEQ_LEN = 1 << 31
_MESSAGE_BYTES = 256
_INT64, _UINT64, _POINTER = ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p
_ARRAYS = [_POINTER, _INT64, _POINTER, _INT64, _INT64]  # lengths, their number, order, its length, seq_len
_FUNCTIONS = {
    "dataset_index_permutation": [_INT64, _UINT64, _UINT64, _UINT64, _POINTER],
    "dataset_index_num_rows": [*_ARRAYS, _POINTER],
    "dataset_index_samples": [*_ARRAYS, _INT64, _POINTER],
}
_ERRORS = {1: ValueError, 2: MemoryError, 3: RuntimeError}


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library, once.

    Raises:
        OSError: it is not built, or does not load.
        AttributeError: it is of another release.
    """
    library = ctypes.CDLL(str(LIBRARY))
    for name, arguments in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = [*arguments, ctypes.c_char_p, _INT64]
        function.restype = ctypes.c_int
    return library


def permutation(count: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Return the permutation of range(count) of (seed, epoch, stream), int64 [count].

    Raises:
        ValueError: count is negative, or another argument is not in [0, 2^64).
    """
    if count < 0:
        raise ValueError(f"count={count} must not be negative")
    for name, value in (("seed", seed), ("epoch", epoch), ("stream", stream)):
        if not 0 <= value < 1 << 64:
            raise ValueError(f"{name}={value} must be in [0, 2^64)")
    result = np.empty(count, dtype=np.int64)
    _call("dataset_index_permutation", count, seed, epoch, stream, result.ctypes.data)
    return result


def build_sample_index(lengths: np.ndarray, order: np.ndarray, seq_len: int) -> np.ndarray:
    """Return the start of each sample as (position in order, offset in the document), int64 [num_samples + 1, 2].

    Args:
        lengths: int64 [num_documents], contiguous.
        order: int64 [num_ordered], contiguous.
        seq_len: tokens of a sample, less one.

    Raises:
        TypeError: lengths or order is no contiguous int64 array; nothing is converted.
        ValueError: an index out of range, a negative length, seq_len out of [1, 2^31], more than 2^62 tokens.
    """
    for name, array in (("lengths", lengths), ("order", order)):
        if not (isinstance(array, np.ndarray) and array.dtype == np.int64 and array.flags.c_contiguous):
            kind = f"{array.dtype} array" if isinstance(array, np.ndarray) else type(array).__name__
            raise TypeError(f"{name} must be a contiguous int64 array, not a {kind}")
        if array.ndim != 1:
            raise ValueError(f"{name} must have one dimension, not {array.ndim}")
    if not 1 <= seq_len <= _MAX_SEQ_LEN:
        raise ValueError(f"seq_len={seq_len} must be in [1, 2^31]")
    inputs = (lengths.ctypes.data, len(lengths), order.ctypes.data, len(order), seq_len)
    num_rows = _INT64()
    _call("dataset_index_num_rows", *inputs, ctypes.byref(num_rows))
    result = np.empty((num_rows.value, 2), dtype=np.int64)
    _call("dataset_index_samples", *inputs, num_rows.value, result.ctypes.data)
    return result


def _call(name: str, *arguments: Any) -> None:
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    code = getattr(load(), name)(*arguments, message, _MESSAGE_BYTES)
    if code:
        raise _ERRORS[code](message.value.decode(errors="replace"))

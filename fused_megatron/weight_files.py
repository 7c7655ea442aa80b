"""Reader of safetensors folders (one file, or several with an index), tensor by tensor; headers are untrusted.

Uses plain reads, not the memory map of safetensors.safe_open: a read of a file that shrinks, or whose network drive
fails, raises an error here, and ends the process with SIGBUS there. Measured with safetensors 0.8, for a quarter of a
tensor of 512 MB: by columns the peak of resident memory grows by 134 MB here and by 515 MB there, since the whole
tensor is mapped; by rows by 130 and 133 MB. A file of 24 tensors that stays open adds all of it (820 MB of 805, half of
which is wanted, against 402 MB). The map is faster where the file is in the page cache: by rows 0.2 s, and 0.5 s here.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from fused_megatron.checks import InputError, check
from fused_megatron.untrusted_files import (
    BLOCK_BYTES,
    COPY_AGAIN,
    MOST_ELEMENTS,
    Shape,
    Size,
    convert,
    open_plain_file,
    parse_json,
    read_json,
)

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
# The limit of the safetensors format.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredWeight:
    """A tensor in a file. Slicing it reads only the selected elements.

    weight[2:4, :8] returns a tensor on the CPU. Slices select from the first dims and must have step 1.

    Attributes:
        start: offset of the tensor's first byte in the file.

    Memory: the result; if dims after the first are sliced, a block of a few MB as well.
    """

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        if not self.shape:
            return self._rows(0, 1).reshape(())
        first, stop, _ = (*index, slice(None))[0].indices(self.shape[0])
        if all(cut.indices(n)[:2] == (0, n) for cut, n in zip(index[1:], self.shape[1:], strict=False)):
            return self._rows(first, max(first, stop))
        columns = (slice(None), *index[1:])
        rows_at_once = max(1, BLOCK_BYTES // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
        sizes = [len(range(*cut.indices(n))) for cut, n in zip(index, self.shape, strict=False)]
        result = torch.empty((*sizes, *self.shape[len(index) :]), dtype=self.dtype)
        # One block for all reads: fresh memory for each costs more than the read.
        block = torch.empty((min(rows_at_once, max(0, stop - first)), *self.shape[1:]), dtype=self.dtype)
        for row in range(first, stop, rows_at_once):
            rows = self._rows(row, min(row + rows_at_once, stop), into=block)
            result[row - first : row - first + len(rows)] = rows[columns]
        return result

    def _rows(self, first: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read the rows from first to stop along dim 0, into the first rows of a tensor or into a new one."""
        tensor = (
            torch.empty((stop - first, *self.shape[1:]), dtype=self.dtype) if into is None else into[: stop - first]
        )
        if tensor.numel() == 0:
            return tensor
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            with open(open_plain_file(self.path), "rb", buffering=0) as file:
                file.seek(self.start + first * len(data) // (stop - first))
                while len(data):
                    count = file.readinto(data[:BLOCK_BYTES])
                    check(bool(count), f"{self.path}: tensor {self.name!r}: the file ends early ({COPY_AGAIN})")
                    data = data[count:]
        except OSError as error:
            raise InputError(f"{self.path}: tensor {self.name!r} cannot be read: {error.strerror}") from None
        return tensor


class WeightFiles:
    """The tensors of a folder by name. All headers are read and checked at once, each tensor only on request.

    Args:
        folder: contains model.safetensors, or model.safetensors.index.json and the files that it names.

    Raises:
        InputError: neither file exists, or a file is damaged; the message names the file and the tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredWeight] = {}
        if (folder / SINGLE_FILE).is_file():
            self.tensors = dict(_read_header(folder / SINGLE_FILE))
            return
        index = folder / INDEX_FILE
        if not index.is_file():
            pickled = [p.name for p in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))]
            hint = f"; it has {pickled[0]}, a pickle, which is not read" if pickled else ""
            raise InputError(
                f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint} "
                f"(transformers writes them: model.save_pretrained(folder))"
            )
        weight_map = _read_index(index)
        for file in sorted(set(weight_map.values())):
            for name, stored in _read_header(folder / file):
                check(
                    weight_map.get(name) == file,
                    f"{folder / file}: tensor {name!r} is there, but {INDEX_FILE} "
                    + (f"says it is in {weight_map[name]}" if name in weight_map else "does not list it")
                    + f": they belong to different models ({COPY_AGAIN})",
                )
                self.tensors[name] = stored
        for name, file in weight_map.items():
            check(
                name in self.tensors,
                f"{folder / file}: tensor {name!r} is not there, but {INDEX_FILE} says so: they belong to different "
                f"models ({COPY_AGAIN})",
            )

    def read(self, name: str) -> torch.Tensor:
        """Read the full tensor to the CPU.

        Raises:
            InputError: its bytes cannot be read.
        """
        return self.tensors[name][()]

    def same(self, one: str, other: str) -> bool:
        """Return whether two tensors are equal bit for bit; they are compared block by block."""
        a, b = self.tensors[one], self.tensors[other]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        left = math.prod(a.shape) * a.dtype.itemsize
        try:
            with open(open_plain_file(a.path), "rb") as file, open(open_plain_file(b.path), "rb") as other_file:
                file.seek(a.start)
                other_file.seek(b.start)
                while left:
                    size = min(left, BLOCK_BYTES)
                    if file.read(size) != other_file.read(size):
                        return False
                    left -= size
        except OSError as error:
            raise InputError(f"{self.folder}: tensors {one!r} and {other!r} cannot be read: {error.strerror}") from None
        return True


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    check(isinstance(weight_map, dict) and bool(weight_map), f"{path}: weight_map must name tensors and their files")
    assert isinstance(weight_map, dict)
    for name, file in weight_map.items():
        # A name without a path: a file outside the folder is never opened.
        plain = isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file
        plain = plain and file.isprintable()
        check(plain, f"{path}: tensor {name!r}: {file!r} must be the name of a .safetensors file beside it")
        check(
            (path.parent / file).is_file(),
            f"{path.parent / file}: no such file, but {path.name} lists tensor {name!r} there",
        )
    return weight_map


def _read_header(path: Path) -> list[tuple[str, StoredWeight]]:
    """Return the tensors of a file in the order of their bytes."""
    try:
        with open(open_plain_file(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            whole = 2 <= length <= _MAX_HEADER_BYTES and 8 + length <= size
            check(
                whole,
                f"{path}: {size} bytes that hold no whole safetensors header: cut short, or another format "
                f"({COPY_AGAIN})",
            )
            content = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        header = parse_json(content, object)
    except InputError as error:
        raise InputError(f"{path}: its safetensors header is {error}: damaged ({COPY_AGAIN})") from None
    check(isinstance(header, dict), f"{path}: its safetensors header is no JSON object: damaged ({COPY_AGAIN})")
    assert isinstance(header, dict)
    header.pop("__metadata__", None)
    found = [(name, _checked_entry(path, name, item)) for name, item in header.items()]
    end = 0
    stored = []
    for name, entry in sorted(found, key=lambda one: (one[1].data_offsets, one[0])):
        begin, stop = entry.data_offsets
        check(begin == end, f"{path}: tensor {name!r}: its data_offsets leave a gap or overlap: damaged ({COPY_AGAIN})")
        check(
            8 + length + stop <= size,
            f"{path}: tensor {name!r} ends at byte {8 + length + stop}, but the file has {size}: cut short "
            f"({COPY_AGAIN})",
        )
        end = stop
        stored.append((name, StoredWeight(path, name, _DTYPES[entry.dtype], entry.shape, 8 + length + begin)))
    check(
        8 + length + end == size,
        f"{path}: {size - 8 - length - end} bytes behind the last tensor: damaged ({COPY_AGAIN})",
    )
    return stored


class _Entry(msgspec.Struct):
    dtype: str
    shape: Shape
    data_offsets: tuple[Size, Size]


def _checked_entry(path: Path, name: str, item: Any) -> _Entry:
    """Return a tensor's entry in the header; its number of bytes must agree with its dtype and shape."""
    try:
        entry = convert(item, _Entry)
    except InputError as error:
        raise InputError(
            f"{path}: tensor {name!r}: its entry in the header is malformed ({error}): damaged ({COPY_AGAIN})"
        ) from None
    dtype = entry.dtype
    shape = entry.shape
    begin, stop = entry.data_offsets
    check(dtype in _DTYPES, f"{path}: tensor {name!r}: dtype {dtype!r:.40} is not known (known: {', '.join(_DTYPES)})")
    # A dim of size 0 counts as 1: torch multiplies the other dims of an empty tensor for its strides.
    check(
        math.prod(n or 1 for n in shape) <= MOST_ELEMENTS,
        f"{path}: tensor {name!r}: shape {shape} is beyond any tensor: damaged ({COPY_AGAIN})",
    )
    num_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
    check(
        stop - begin == num_bytes,
        f"{path}: tensor {name!r}: {stop - begin} bytes, but {dtype} of shape {shape} has {num_bytes}: damaged "
        f"({COPY_AGAIN})",
    )
    return entry

"""The safetensors files of a folder, one or several with an index, read tensor by tensor; no header is trusted.

Read by plain reads and not through a memory map, whose pages count as the process's own as long as the file is open.
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
    MOST_ELEMENTS,
    MOST_JSON_BYTES,
    Shape,
    Size,
    convert,
    open_plain_file,
    parse_json,
    read_bounded,
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

# Bytes in flight: large enough that the calls cost nothing, small enough to be far from any memory limit.
BLOCK_BYTES = 4 << 20
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
# What the format itself allows.
_MAX_HEADER_BYTES = 100_000_000
_COPY_AGAIN = "copy or download it again"


@dataclass(frozen=True)
class StoredWeight:
    """A tensor in a file, and where its bytes begin there; slicing it reads what is asked for.

    weight[2:4, :8] is a tensor on the CPU: of slices with step 1, for the first dims.

    Memory: the result, and a block of a few MB where later dims are cut.
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
        for row in range(first, stop, rows_at_once):
            rows = self._rows(row, min(row + rows_at_once, stop))
            result[row - first : row - first + len(rows)] = rows[columns]
        return result

    def _rows(self, first: int, stop: int) -> torch.Tensor:
        """Of dim 0."""
        tensor = torch.empty((stop - first, *self.shape[1:]), dtype=self.dtype)
        if tensor.numel() == 0:
            return tensor
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            with open(open_plain_file(self.path), "rb", buffering=0) as file:
                file.seek(self.start + first * len(data) // (stop - first))
                while len(data):
                    count = file.readinto(data[:BLOCK_BYTES])
                    check(bool(count), f"{self.path}: tensor {self.name!r}: the file ends early ({_COPY_AGAIN})")
                    data = data[count:]
        except OSError as error:
            raise InputError(f"{self.path}: tensor {self.name!r} cannot be read: {error.strerror}") from None
        return tensor


class WeightFiles:
    """Every tensor of a folder by name; the headers are read and checked at once, numbers when asked for.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and the files that it names.

    Raises:
        InputError: neither is there, or one is damaged: the file and the tensor are named.
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
                    + f": they belong to different models ({_COPY_AGAIN})",
                )
                self.tensors[name] = stored
        for name, file in weight_map.items():
            check(
                name in self.tensors,
                f"{folder / file}: tensor {name!r} is not there, but {INDEX_FILE} says so: they belong to different "
                f"models ({_COPY_AGAIN})",
            )

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU.

        Raises:
            InputError: its bytes cannot be read.
        """
        return self.tensors[name][()]

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are equal bit for bit; block by block."""
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: the file is absent, or holds something else.
    """
    try:
        content = read_bounded(path, MOST_JSON_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    try:
        value = parse_json(content, object, finite=False)
    except InputError as error:
        raise InputError(f"{path} is {error}: {_COPY_AGAIN}") from None
    check(isinstance(value, dict), f"{path} must hold a JSON object, not {type(value).__name__}")
    assert isinstance(value, dict)
    return value


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    check(isinstance(weight_map, dict) and bool(weight_map), f"{path}: weight_map must name tensors and their files")
    assert isinstance(weight_map, dict)
    for name, file in weight_map.items():
        # A plain name: nothing outside the folder is ever opened.
        plain = isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file
        plain = plain and file.isprintable()
        check(plain, f"{path}: tensor {name!r}: {file!r} must be the name of a .safetensors file beside it")
        check(
            (path.parent / file).is_file(),
            f"{path.parent / file}: no such file, but {path.name} lists tensor {name!r} there",
        )
    return weight_map


def _read_header(path: Path) -> list[tuple[str, StoredWeight]]:
    """Every tensor of a file, in the order of its bytes."""
    try:
        with open(open_plain_file(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            whole = 2 <= length <= _MAX_HEADER_BYTES and 8 + length <= size
            check(
                whole,
                f"{path}: {size} bytes that hold no whole safetensors header: cut short, or another format "
                f"({_COPY_AGAIN})",
            )
            content = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        header = parse_json(content, object)
    except InputError as error:
        raise InputError(f"{path}: its safetensors header is {error}: damaged ({_COPY_AGAIN})") from None
    check(isinstance(header, dict), f"{path}: its safetensors header is no JSON object: damaged ({_COPY_AGAIN})")
    assert isinstance(header, dict)
    header.pop("__metadata__", None)
    found = [(name, _checked_entry(path, name, item)) for name, item in header.items()]
    end, stored = 0, []
    for name, entry in sorted(found, key=lambda one: (one[1].data_offsets, one[0])):
        begin, stop = entry.data_offsets
        check(
            begin == end, f"{path}: tensor {name!r}: its data_offsets leave a gap or overlap: damaged ({_COPY_AGAIN})"
        )
        check(
            8 + length + stop <= size,
            f"{path}: tensor {name!r} ends at byte {8 + length + stop}, but the file has {size}: cut short "
            f"({_COPY_AGAIN})",
        )
        end = stop
        stored.append((name, StoredWeight(path, name, _DTYPES[entry.dtype], entry.shape, 8 + length + begin)))
    check(
        8 + length + end == size,
        f"{path}: {size - 8 - length - end} bytes behind the last tensor: damaged ({_COPY_AGAIN})",
    )
    return stored


class _Entry(msgspec.Struct):
    dtype: str
    shape: Shape
    data_offsets: tuple[Size, Size]


def _checked_entry(path: Path, name: str, item: Any) -> _Entry:
    """A tensor's entry in the header, whose bytes must be as many as its dtype and shape have."""
    try:
        entry = convert(item, _Entry)
    except InputError as error:
        raise InputError(
            f"{path}: tensor {name!r}: its entry in the header is malformed ({error}): damaged ({_COPY_AGAIN})"
        ) from None
    dtype, shape, (begin, stop) = entry.dtype, entry.shape, entry.data_offsets
    check(dtype in _DTYPES, f"{path}: tensor {name!r}: dtype {dtype!r:.40} is not known (known: {', '.join(_DTYPES)})")
    # An empty tensor's other sizes count too: torch multiplies them for its strides.
    check(
        math.prod(n or 1 for n in shape) <= MOST_ELEMENTS,
        f"{path}: tensor {name!r}: shape {shape} is beyond any tensor: damaged ({_COPY_AGAIN})",
    )
    num_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
    check(
        stop - begin == num_bytes,
        f"{path}: tensor {name!r}: {stop - begin} bytes, but {dtype} of shape {shape} has {num_bytes}: damaged "
        f"({_COPY_AGAIN})",
    )
    return entry

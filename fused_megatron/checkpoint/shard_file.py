"""One rank's file: plain safetensors, written and read as a stream, with a checksum a tensor.

Written here and not by the safetensors library, which knows no checksum, no fsync, and reports a full disk as a Rust
error; its `serialize_file` would also need contiguous CPU copies of all tensors at once. What is written opens in any
safetensors reader. The reader here trusts no header: the manifest says which tensors a file holds, the one header that
goes with them is computed from that, and the file must begin with exactly those bytes.

Checksums are CRC-32, by zlib: 1 to 4 GB/s a core, faster than disks (sha256: 1.4 GB/s at best). It finds every error of
up to 32 bits in a row and all but 1 in 4e9 of the others. It is no signature: whoever can write the folder can write
the checksums too, which is why nothing in a checkpoint is ever executed.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fused_megatron.checkpoint.errors import CheckpointError, read_error
from fused_megatron.durable import new_durable_file, write_all
from fused_megatron.sharding.box import row_blocks
from fused_megatron.untrusted_files import open_plain_file
from fused_megatron.weight_files import BLOCK_BYTES, SAFETENSORS_DTYPES

ConsumeRows = Callable[[int, torch.Tensor], None]
"""Takes (first row, rows [n, ...]) of a stored tensor; the rows' memory is reused after the call."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def in_file_order(entries: Sequence[Entry]) -> list[Entry]:
    """Widest dtype first: so every tensor is aligned to its own item size, which memory-mapping readers ask for."""
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))


def header_bytes(entries: Sequence[Entry], step: int) -> bytes:
    """The safetensors header of a file with these entries: a pure function of them, byte for byte.

    The step is in it, so that a file of another step is told apart even where no value changed.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", "step": str(step)}}
    start = 0
    for entry in in_file_order(entries):
        dtype, stop = SAFETENSORS_DTYPES[entry.dtype], start + entry.num_bytes
        header[entry.key] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_bytes(entries: Sequence[Entry], step: int) -> int:
    return len(header_bytes(entries, step)) + sum(entry.num_bytes for entry in entries)


def _as_bytes(rows: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor. (as_strided: a lone element counts as contiguous with any stride, and cannot
    be viewed as bytes with that.)"""
    assert rows.is_contiguous()
    return rows.as_strided((rows.numel(),), (1,)).view(torch.uint8).numpy().data


def write_shard_file(path: Path, tensors: Mapping[Entry, torch.Tensor], step: int) -> dict[str, int]:
    """Write the tensors to path, durably, block by block; the checksum of each key.

    Memory: one block of at most BLOCK_BYTES or one row is copied at a time, from any device and any strides.
    """
    checksums = {}
    with new_durable_file(path) as descriptor:
        write_all(descriptor, memoryview(header_bytes(list(tensors), step)))
        for entry in in_file_order(list(tensors)):
            checksums[entry.key] = _write_tensor(descriptor, tensors[entry].detach())
    return checksums


def _write_tensor(descriptor: int, source: torch.Tensor) -> int:
    """Write one tensor; its checksum. A function, so that nothing holds the tensor when the next is made."""
    checksum = 0
    source = source.reshape(1) if source.dim() == 0 else source
    staging = torch.empty(0)
    as_it_lies = source.device.type == "cpu" and not (source.is_conj() or source.is_neg())
    for start, stop in row_blocks(source.shape, source.dtype.itemsize, BLOCK_BYTES):
        rows = source[start:stop]
        if not (as_it_lies and rows.is_contiguous()):
            if staging.shape != rows.shape:  # the first block, or a shorter last one
                staging = torch.empty(rows.shape, dtype=source.dtype)
            rows = staging.copy_(rows)
        data = _as_bytes(rows)
        checksum = zlib.crc32(data, checksum)
        write_all(descriptor, data)
    return checksum


class ShardFileReader:
    """An opened file whose size and header are those of its entries; `read` streams one tensor and checks it."""

    def __init__(self, path: Path, entries: Sequence[Entry], step: int) -> None:
        self.path = path
        self._offsets: dict[str, int] = {}
        header = header_bytes(entries, step)
        offset = len(header)
        for entry in in_file_order(entries):
            self._offsets[entry.key] = offset
            offset += entry.num_bytes
        self._descriptor = open_regular_file(path)
        try:
            actual = os.fstat(self._descriptor).st_size
            if actual != offset:
                raise CheckpointError(f"{path}: {actual} bytes long, must be {offset} by the manifest")
            if os.pread(self._descriptor, len(header), 0) != header:
                raise CheckpointError(f"{path}: its header is not the one of the manifest: damaged, or of another step")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> "ShardFileReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, entry: Entry, checksum: int, consume: ConsumeRows | None, label: str) -> None:
        """Stream a tensor through consume; raise CheckpointError, naming it by label, where its checksum is wrong.

        consume runs before the checksum is known: after an error, what it wrote is void.
        """
        position, actual = self._offsets[entry.key], 0
        # Nobody takes the rows of a mere check: it runs flat, in constant memory whatever the shape.
        shape = (entry.shape or (1,)) if consume is not None else (math.prod(entry.shape),)
        blocks = list(row_blocks(shape, entry.dtype.itemsize, BLOCK_BYTES))
        staging = torch.empty((blocks[0][1], *shape[1:]) if blocks else (0,), dtype=entry.dtype)
        for start, stop in blocks:
            rows = staging[: stop - start]
            data = _as_bytes(rows)
            position = self._read_into(data, position)
            actual = zlib.crc32(data, actual)
            if entry.dtype == torch.bool and rows.view(torch.uint8).max() > 1:
                raise CheckpointError(f"{self.path}: {label}: a boolean that is neither 0 nor 1")  # undefined in torch
            if consume is not None:
                consume(start, rows)
        if actual != checksum:
            raise CheckpointError(
                f"{self.path}: {label}: its checksum is {actual:08x}, must be {checksum:08x}: the data is damaged"
            )

    def _read_into(self, data: memoryview, position: int) -> int:
        while len(data):
            try:
                count = os.preadv(self._descriptor, [data], position)
            except OSError as error:
                raise read_error(self.path, error) from error
            if count == 0:
                raise CheckpointError(f"{self.path}: it ends early, at {position} bytes: it was cut while being read")
            position, data = position + count, data[count:]
        return position


def open_regular_file(path: Path) -> int:
    """Descriptor for reading; CheckpointError where it is absent, a link, a pipe or anything but a plain file.

    UnreadableError where the system does not open it now, and may later.
    """
    try:
        return open_plain_file(path, follow_links=False)
    except OSError as error:
        raise read_error(path, error) from error

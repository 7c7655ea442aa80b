"""Checkpoint file of one rank: plain safetensors, written and read as a stream, with a checksum for each tensor.

The safetensors library is not used: it has no checksum and no fsync, reports a full disk as a Rust error, and its
`serialize_file` needs contiguous CPU copies of all tensors at once. Any safetensors reader can open the files. The
reader here trusts no header: the manifest says which tensors a file holds, the expected header is computed from it, and
the file must begin with exactly these bytes.

Checksums are CRC-32 by zlib: 1 to 4 GB/s a core, faster than disks (sha256: 1.4 GB/s at best). CRC-32 detects every
error of up to 32 consecutive bits, and all but 1 in 4e9 of the others. It is no signature: a person who can write the
folder can also write the checksums. Therefore nothing in a checkpoint is ever executed.
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
"""Function of (first row, rows [n, ...]) of a stored tensor; the memory of the rows is reused after the call."""


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
    """Sort by item size, widest first, so that every tensor is aligned to its item size, as memory mapping needs."""
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))


def header_bytes(entries: Sequence[Entry], step: int) -> bytes:
    """Return the safetensors header of a file with these entries, which determine every byte of it.

    The header holds the step, so that files of two steps differ even if no value has changed.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", "step": str(step)}}
    start = 0
    for entry in in_file_order(entries):
        dtype = SAFETENSORS_DTYPES[entry.dtype]
        stop = start + entry.num_bytes
        header[entry.key] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_bytes(entries: Sequence[Entry], step: int) -> int:
    """Return the size in bytes of a file with these entries."""
    return len(header_bytes(entries, step)) + sum(entry.num_bytes for entry in entries)


def _as_bytes(rows: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    assert rows.is_contiguous()
    # as_strided: a tensor of one element counts as contiguous with any stride, but cannot be viewed as bytes then.
    return rows.as_strided((rows.numel(),), (1,)).view(torch.uint8).numpy().data


def write_shard_file(path: Path, tensors: Mapping[Entry, torch.Tensor], step: int) -> dict[str, int]:
    """Write the tensors to path, durably, block by block; return the checksum of each key.

    Memory: one block of at most BLOCK_BYTES or one row is copied at a time, from any device and any strides.
    """
    checksums = {}
    with new_durable_file(path) as descriptor:
        write_all(descriptor, memoryview(header_bytes(list(tensors), step)))
        for entry in in_file_order(list(tensors)):
            checksums[entry.key] = _write_tensor(descriptor, tensors[entry].detach())
    return checksums


def _write_tensor(descriptor: int, source: torch.Tensor) -> int:
    """Write one tensor and return its checksum. A function of its own, so that no variable keeps the tensor alive."""
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
    """Open file whose size and header match its entries; read() streams one tensor and verifies its checksum."""

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
        """Stream a tensor through consume; raise CheckpointError if its checksum is wrong.

        consume runs before the checksum is known, so after an error its output is invalid.

        Args:
            entry: the tensor.
            checksum: its expected CRC-32.
            consume: called with each block of rows; None: only verify the checksum.
            label: name of the tensor in messages.
        """
        position = self._offsets[entry.key]
        actual = 0
        # Without consume the tensor is read as one dim: in constant memory, for any shape.
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
            position += count
            data = data[count:]
        return position


def open_regular_file(path: Path) -> int:
    """Open a plain file for reading and return its descriptor.

    Raises:
        CheckpointError: the file is missing, a link, a pipe or anything else that is not a plain file.
        UnreadableError: the system cannot open it now, but may later.
    """
    try:
        return open_plain_file(path, follow_links=False)
    except OSError as error:
        raise read_error(path, error) from error

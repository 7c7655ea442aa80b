"""The file manifest.json of a checkpoint: names, shapes, boxes, checksums and state, without the tensor data.

A checkpoint may come from anybody, so reading checks every field.
"""

import functools
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch

from fused_megatron.checkpoint.errors import CheckpointError, read_error
from fused_megatron.checkpoint.shard_file import Entry, file_bytes, open_regular_file
from fused_megatron.checks import InputError, dtype_name
from fused_megatron.sharding.box import Box, cover_problem
from fused_megatron.untrusted_files import MOST_ELEMENTS, Shape, Size, convert, parse_json
from fused_megatron.weight_files import SAFETENSORS_DTYPES

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
# Rank-private tensors (RNG states) share the file with the rank's shards, under this prefix.
RANK_TENSOR_PREFIX = "rank_tensors/"

_DTYPES = {dtype_name(dtype): dtype for dtype in SAFETENSORS_DTYPES}
_DIGEST_START = b'{"sha256": "'
_NO_DIGEST = b"0" * 64
_MAX_BYTES = 1 << 30  # a manifest needs about 300 bytes a shard: this is enough for any model


class _BoxRecord(msgspec.Struct):
    # Only the names that we write are allowed: no file outside the folder is ever opened.
    file: Annotated[str, msgspec.Meta(pattern=r"^rank-[0-9]{5,9}-of-[0-9]{5,9}\.safetensors\Z")]
    offset: Shape
    shape: Shape
    crc32: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}\Z")]


class _TensorRecord(msgspec.Struct):
    dtype: str
    shape: Shape
    boxes: list[_BoxRecord]


class _FileRecord(msgspec.Struct):
    bytes: Size


class _Version(msgspec.Struct):
    version: Any


class _Document(msgspec.Struct):
    """The JSON of a manifest."""

    format: Literal["fused_megatron checkpoint"]
    step: Size
    world_size: Size
    files: dict[str, _FileRecord]
    tensors: dict[str, _TensorRecord]
    rank_tensors: dict[Annotated[str, msgspec.Meta(pattern=r"^(0|[1-9][0-9]{0,8})\Z")], dict[str, _TensorRecord]]
    state: dict[str, Any]


def file_name(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True)
class StoredBox:
    """A block of a full tensor, the file that holds it, and its CRC-32."""

    file: str
    box: Box
    crc32: int


@dataclass(frozen=True)
class StoredEntry:
    """A tensor in a file, its CRC-32, and its name in messages."""

    entry: Entry
    crc32: int
    label: str


@dataclass(frozen=True)
class StoredTensor:
    """A full tensor and the boxes that cover it exactly once; an empty tensor may have no box."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]


@dataclass(frozen=True)
class Manifest:
    """Content of a checkpoint without the tensor data.

    Attributes:
        step, world_size: of the run when it was saved.
        tensors: full tensors by name.
        rank_tensors: for each rank, its private tensors by name, each in one box.
        state: the JSON state that was given to save_checkpoint.
    """

    step: int
    world_size: int
    tensors: Mapping[str, StoredTensor]
    rank_tensors: Mapping[int, Mapping[str, StoredTensor]]
    state: dict[str, Any]

    @functools.cached_property
    def files(self) -> dict[str, dict[str, "StoredEntry"]]:
        """Entries of each file, by their key in that file."""
        files: dict[str, dict[str, StoredEntry]] = {}

        def add(stored: StoredBox, entry: Entry, label: str) -> None:
            entries = files.setdefault(stored.file, {})
            if entry.key in entries:
                raise ValueError(f"{stored.file} holds {label} twice")
            entries[entry.key] = StoredEntry(entry, stored.crc32, label)

        for name, tensor in self.tensors.items():
            for stored in tensor.boxes:
                add(stored, Entry(name, tensor.dtype, stored.box.shape), f"tensor {name!r}")
        for rank, tensors in self.rank_tensors.items():
            for name, tensor in tensors.items():
                key = RANK_TENSOR_PREFIX + name
                add(tensor.boxes[0], Entry(key, tensor.dtype, tensor.shape), f"rank tensor {name!r} of rank {rank}")
        return files

    def entries(self, file: str) -> list[Entry]:
        return [stored.entry for stored in self.files[file].values()]

    def to_bytes(self) -> bytes:
        """Return the file's content: JSON that begins with its SHA-256, computed with zeros in place of the digest."""
        files = {name: {"bytes": file_bytes(self.entries(name), self.step)} for name in self.files}
        document = {
            "sha256": _NO_DIGEST.decode(),
            "format": "fused_megatron checkpoint",
            "version": FORMAT_VERSION,
            "step": self.step,
            "world_size": self.world_size,
            "files": files,
            "tensors": {name: _tensor_to_json(tensor) for name, tensor in self.tensors.items()},
            "rank_tensors": {
                str(rank): {name: _tensor_to_json(tensor) for name, tensor in tensors.items()}
                for rank, tensors in self.rank_tensors.items()
            },
            "state": self.state,
        }
        text = json.dumps(document, allow_nan=False).encode()
        assert text.startswith(_DIGEST_START + _NO_DIGEST)
        digest = hashlib.sha256(text).hexdigest().encode()
        return _DIGEST_START + digest + text[len(_DIGEST_START) + len(digest) :]


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of the checkpoint folder at path; verify its digest and every field. Reads no tensor data.

    Raises:
        CheckpointError: the manifest is missing, damaged, or of a format that this release does not know.
        UnreadableError: it cannot be read now.
    """
    return read_manifest_and_digest(Path(path))[0]


def read_manifest_and_digest(path: Path) -> tuple[Manifest, str]:
    """Read the manifest as read_manifest does; return it and the SHA-256 of the file."""
    location = path / MANIFEST_NAME
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a folder")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint folder") from None
    except OSError as error:
        raise read_error(path, error) from error
    text = _read(location)
    start, stop = len(_DIGEST_START), len(_DIGEST_START) + len(_NO_DIGEST)
    expected = hashlib.sha256(_DIGEST_START + _NO_DIGEST + text[stop:]).hexdigest()
    if text[start:stop] != expected.encode():
        raise CheckpointError(f"{location}: damaged: its sha256 is not the one that it states")
    try:
        return _parse(text), expected
    except ValueError as error:
        # The digest is right but the document is not: written by hand, or by another release of this library.
        raise CheckpointError(f"{location}: malformed: {error}") from error


def _read(location: Path) -> bytes:
    """Return the content of the file; read only its beginning if the beginning or the size is wrong."""
    with open(open_regular_file(location), "rb") as file:
        try:
            size = os.fstat(file.fileno()).st_size
            text = file.read(len(_DIGEST_START))
            if text == _DIGEST_START and size <= _MAX_BYTES:
                return text + file.read(_MAX_BYTES)
        except OSError as error:
            raise read_error(location, error) from error
    raise CheckpointError(f"{location}: not a manifest of a checkpoint of fused_megatron, or damaged")


def check_json_state(value: Any, where: str = "state") -> None:
    """Raise InputError, naming the wrong item, unless value survives JSON unchanged (tuples become lists)."""
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise InputError(f"{where} has the key {key!r}: keys must be strings to be stored as JSON")
            check_json_state(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_json_state(item, f"{where}[{i}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(
                f"{where}={value} must be finite to be stored as JSON (use None for a value not yet known)"
            )
    elif not isinstance(value, str | int | None):
        raise InputError(
            f"{where} is a {type(value).__name__}: must be dict, list, str, int, float, bool or None "
            "(a tensor belongs in tensors or rank_tensors)"
        )


def _tensor_to_json(tensor: StoredTensor) -> dict[str, Any]:
    boxes = [
        {"file": b.file, "offset": list(b.box.offset), "shape": list(b.box.shape), "crc32": f"{b.crc32:08x}"}
        for b in tensor.boxes
    ]
    return {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "boxes": boxes}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _parse(text: bytes) -> Manifest:
    document = parse_json(text, dict[str, Any])
    version = convert(document, _Version).version
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format version {version!r:.20}, this library reads {FORMAT_VERSION} (another release wrote it)"
        )
    record = convert(document, _Document)
    tensors = {name: _parse_tensor(name, item) for name, item in record.tensors.items()}
    rank_tensors = {}
    for rank_text, items in record.rank_tensors.items():
        rank = int(rank_text)
        _require(rank < record.world_size, f"rank_tensors: rank {rank} of {record.world_size}")
        rank_tensors[rank] = {name: _parse_tensor(name, item) for name, item in items.items()}
        for name, tensor in rank_tensors[rank].items():
            _require(len(tensor.boxes) == 1 and tensor.boxes[0].box.shape == tensor.shape, f"{name!r}: one box wanted")
    manifest = Manifest(record.step, record.world_size, tensors, rank_tensors, record.state)
    stated = {name: item.bytes for name, item in record.files.items()}
    computed = {name: file_bytes(manifest.entries(name), manifest.step) for name in manifest.files}
    _require(stated == computed, "files do not have the sizes of their tensors")
    return manifest


def _parse_tensor(name: str, item: _TensorRecord) -> StoredTensor:
    _require(item.dtype in _DTYPES, f"tensor {name!r}: unknown dtype {item.dtype!r:.40}")
    # Sizes of 0 count as 1: torch multiplies the other sizes of an empty tensor for its strides.
    _require(math.prod(n or 1 for n in item.shape) <= MOST_ELEMENTS, f"tensor {name!r}: shape out of bounds")
    boxes = []
    for stored in item.boxes:
        box = Box(stored.offset, stored.shape)
        _require(box.lies_in(item.shape), f"tensor {name!r}: box {box} is not inside {item.shape}")
        boxes.append(StoredBox(stored.file, box, int(stored.crc32, 16)))
    if problem := cover_problem(item.shape, [stored.box for stored in boxes if stored.box.volume]):
        raise ValueError(f"tensor {name!r}: {problem}")
    return StoredTensor(_DTYPES[item.dtype], item.shape, tuple(boxes))

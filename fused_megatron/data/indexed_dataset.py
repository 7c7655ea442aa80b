"""Token datasets in Megatron's .bin/.idx format: a reader that validates them, and a byte-compatible writer.

The .idx file, little-endian: 9 bytes "MMIDIDX\\0\\0", u64 version (1), u8 dtype code, u64 num_sequences,
u64 num_document_indices, i32 lengths [num_sequences], i64 byte pointers [num_sequences],
i64 document indices [num_document_indices], and for multimodal data i8 modes [num_sequences].
Document d has the sequences document_indices[d] to document_indices[d + 1] - 1. The .bin file holds only the tokens.
"""

import contextlib
import errno
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike

from fused_megatron.checks import InputError, check
from fused_megatron.data.token_digest import Checksums, check_index, digest_path, read_digest, write_digest
from fused_megatron.observe.free_memory import memory_bytes
from fused_megatron.untrusted_files import open_plain_file

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items() if dtype.kind in "iu"}
# Megatron's limit for uint16; the margin below 65536 leaves room for tokens that are added later.
_UINT16_VOCAB_LIMIT = 65500
# Copies of the index in memory: the bytes, the arrays made of them, and the arrays that the checks compare.
_INDEX_COPIES = 3
# The format stores the length of a sequence as int32.
_MAX_SEQUENCE_LENGTH = 2**31 - 1


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype in which Megatron stores the ids of a vocabulary: uint16 below 65500 entries, else int32."""
    return np.dtype(np.uint16) if vocab_size < _UINT16_VOCAB_LIMIT else np.dtype(np.int32)


def dataset_files(path_prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the paths of the .bin and the .idx file of a prefix."""
    prefix = os.fspath(path_prefix)
    return Path(prefix + ".bin"), Path(prefix + ".idx")


class IndexedDataset:
    """A dataset of token sequences on disk, read through a memory map.

    Opening checks everything that can be checked without reading the tokens, so that a run with a damaged file fails
    at its start and not days later. `digest` has the checksums of the tokens. Returned arrays are read-only views that
    keep the memory map alive, also after the dataset is gone. A dataset can be pickled; the copy opens the files again.

    Args:
        path_prefix: path of the two files without .bin and .idx.

    Attributes:
        digest: checksums and vocabulary size of the files; None if there is no digest.

    Raises:
        InputError: a file is missing, truncated or inconsistent; names the file and the fault.
    """

    def __init__(self, path_prefix: str | os.PathLike[str]) -> None:
        self.path_prefix = os.fspath(path_prefix)
        bin_path, idx_path = dataset_files(self.path_prefix)
        index = _read_index(idx_path)
        self.dtype, num_sequences, num_indices = _parse_header(idx_path, index, len(index))
        self.sequence_lengths, pointers, self.document_indices, self.sequence_modes = _parse_arrays(
            idx_path, index, num_sequences, num_indices
        )
        self._ends = np.cumsum(self.sequence_lengths, dtype=np.int64)
        _check_index(idx_path, self.sequence_lengths, pointers, self.document_indices, self._ends, self.dtype.itemsize)
        self.total_tokens = int(self._ends[-1]) if num_sequences else 0
        self._tokens = _map_tokens(bin_path, idx_path, self.dtype, self.total_tokens)
        self.digest = read_digest(self.path_prefix)
        if self.digest is not None:
            check_index(self.path_prefix, self.digest, index)

    def __len__(self) -> int:
        """Number of sequences; if every document is one sequence, also the number of documents."""
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the tokens of one sequence: [length] of self.dtype, read-only. Negative indices count from the end."""
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"sequence {index} of {self.path_prefix}, which has {length}")
        index %= length
        end = int(self._ends[index])
        return self.tokens(end - int(self.sequence_lengths[index]), end)

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Return tokens start to end - 1 of all sequences concatenated: [end - start] of self.dtype, read-only."""
        if not 0 <= start <= end <= self.total_tokens:
            raise IndexError(f"tokens {start} to {end} of {self.path_prefix}, which has {self.total_tokens}")
        return self._tokens[start:end]

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    def document_offsets(self) -> np.ndarray:
        """Return offsets, int64 [num_documents + 1]: document d is tokens offsets[d] to offsets[d + 1] - 1."""
        return np.concatenate([np.zeros(1, np.int64), self._ends])[self.document_indices]

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedDataset, (self.path_prefix,)


class IndexedDatasetWriter:
    """Atomic writer of a dataset for IndexedDataset and Megatron, and of its checksums.

    Tokens go to temporary files. finalize() syncs them and moves them to the target: first the .bin, then the .idx,
    then the checksums. So an .idx never belongs to another .bin, even if the process dies in between. As a context
    manager, the writer finalizes at the end of the block; if the block raises, it removes the temporary files.

    Args:
        path_prefix: path of the two files without .bin and .idx.
        dtype: integer type of the stored tokens; token_dtype(vocab_size) returns Megatron's choice.
        vocab_size: size of the vocabulary, which is written with the checksums; None if it is unknown.

    Raises:
        InputError: the folder cannot be written, the disk is full, a token does not fit into dtype or vocab_size.
    """

    def __init__(self, path_prefix: str | os.PathLike[str], dtype: DTypeLike, *, vocab_size: int | None = None) -> None:
        self.path_prefix = os.fspath(path_prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODE_OF_DTYPE:
            wanted = ", ".join(str(d) for d in _CODE_OF_DTYPE)
            raise TypeError(f"dtype={np.dtype(dtype)} must be one of: {wanted}")
        self._vocab_size = vocab_size
        self._checksums = Checksums()
        self._lengths: list[int] = []
        self._document_indices = [0]
        bin_path, idx_path = dataset_files(self.path_prefix)
        self._temporary = {path: path.with_name(f"{path.name}.tmp-{os.getpid()}") for path in (bin_path, idx_path)}
        try:
            self._bin: BinaryIO = open(self._temporary[bin_path], "wb")  # noqa: SIM115 (closed by finalize or abort)
        except OSError as error:
            raise _write_error(bin_path, error) from error

    def add_document(self, tokens: np.ndarray | Sequence[int], sequence_lengths: Sequence[int] | None = None) -> None:
        """Append one document.

        Args:
            tokens: integers [num_tokens]; may be empty.
            sequence_lengths: lengths of the document's sequences; None for one sequence.
        """
        array = np.asarray(tokens) if len(tokens) else np.empty(0, self.dtype)
        document = len(self._document_indices) - 1
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TypeError(
                f"document {document}: tokens must be integers [num_tokens], not {array.dtype}{array.shape}"
            )
        lengths = [len(array)] if sequence_lengths is None else [int(n) for n in sequence_lengths]
        if sum(lengths) != len(array) or min(lengths, default=0) < 0:
            raise InputError(f"document {document}: sequence_lengths must add up to its {len(array)} tokens")
        if max(lengths, default=0) > _MAX_SEQUENCE_LENGTH:
            raise InputError(
                f"document {document}: a sequence of {max(lengths)} tokens, but the format holds at most "
                f"{_MAX_SEQUENCE_LENGTH}: divide it by sequence_lengths"
            )
        limits = np.iinfo(self.dtype)
        if len(array) and not (array.min() >= limits.min and array.max() <= limits.max):
            worst = array.min() if array.min() < limits.min else array.max()
            raise InputError(
                f"document {document}: token id {worst} does not fit into {self.dtype} "
                f"({limits.min} to {limits.max}): choose dtype by token_dtype(vocab_size)"
            )
        if self._vocab_size is not None and len(array):
            worst = array.min() if array.min() < 0 else array.max()
            check(
                0 <= worst < self._vocab_size,
                f"document {document}: token id {worst} is not in [0, vocab_size={self._vocab_size})",
            )
        data = array.astype(self.dtype, copy=False).tobytes()
        self._checksums.update(data)
        try:
            self._bin.write(data)
        except OSError as error:
            self.abort()
            raise _write_error(dataset_files(self.path_prefix)[0], error) from error
        self._lengths.extend(lengths)
        self._document_indices.append(len(self._lengths))

    def finalize(self) -> None:
        """Sync both files and move them to the target; existing files there are replaced."""
        bin_path, idx_path = dataset_files(self.path_prefix)
        try:
            with self._bin:
                sync(self._bin)
            index = self._index_bytes()
            with open(self._temporary[idx_path], "wb") as file:
                file.write(index)
                sync(file)
            idx_path.unlink(missing_ok=True)
            digest_path(self.path_prefix).unlink(missing_ok=True)
            os.replace(self._temporary[bin_path], bin_path)
            os.replace(self._temporary[idx_path], idx_path)
            # write_digest also syncs the folder, and so the names of all three files.
            write_digest(self.path_prefix, self._checksums.digest(index, self._vocab_size))
        except OSError as error:
            self.abort()
            raise _write_error(idx_path, error) from error

    def abort(self) -> None:
        """Remove the temporary files; the target stays as it was."""
        with contextlib.suppress(OSError):  # close() flushes, and that fails on a full disk; the file is removed anyway
            self._bin.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def _index_bytes(self) -> bytes:
        lengths = np.asarray(self._lengths, dtype="<i4")
        pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * self.dtype.itemsize
        indices = np.asarray(self._document_indices, dtype="<i8")
        header = _HEADER.pack(_MAGIC, _VERSION, _CODE_OF_DTYPE[self.dtype], len(lengths), len(indices))
        return header + lengths.tobytes() + pointers.astype("<i8").tobytes() + indices.tobytes()

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finalize()
        else:
            self.abort()


def sync(file: BinaryIO) -> None:
    """Flush the file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def _write_error(path: Path, error: OSError) -> InputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"{path}: the disk is full ({error.strerror}): free space or choose another folder")
    return InputError(f"{path}: cannot be written ({error.strerror}): choose another folder")


def _read_index(path: Path) -> bytes:
    """Read the .idx file; if the header or the size is wrong, raise before reading more than the header."""
    try:
        with open(open_plain_file(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(_HEADER.size)
            _parse_header(path, start, size)
            # A sparse file can claim any size for free.
            memory = memory_bytes()[0]
            check(
                size * _INDEX_COPIES <= memory or not memory,
                f"{path}: {size / 1e9:.1f} GB, which take {_INDEX_COPIES} times as much memory, of which there are "
                f"{memory / 1e9:.1f} GB: divide the dataset",
            )
            return start + file.read(size - len(start))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; an indexed dataset is a .bin and an .idx file of one prefix") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _damaged(path: Path, what: str, expected: object, got: object) -> InputError:
    return InputError(
        f"{path}: {what} must be {expected}, not {got}: the file is damaged or of another kind; copy or build it again"
    )


def _parse_header(path: Path, start: bytes, file_size: int) -> tuple[np.dtype, int, int]:
    if len(start) < _HEADER.size:
        raise _damaged(path, "size", f"at least {_HEADER.size} bytes", len(start))
    magic, version, code, num_sequences, num_indices = _HEADER.unpack_from(start)
    if magic != _MAGIC:
        raise _damaged(path, "the first 9 bytes", _MAGIC, magic)
    if version != _VERSION:
        raise _damaged(path, "version", _VERSION, version)
    if code not in _DTYPE_OF_CODE:
        raise _damaged(path, "dtype code", "in 1 to 8", code)
    dtype = _DTYPE_OF_CODE[code]
    if dtype not in _CODE_OF_DTYPE:
        raise _damaged(path, "dtype code", "that of an integer (token ids)", f"{code} ({dtype})")
    if num_indices < 1:
        raise _damaged(path, "number of document indices", "at least 1", num_indices)
    size = _HEADER.size + 12 * num_sequences + 8 * num_indices
    if file_size not in (size, size + num_sequences):
        what = f"size (of {num_sequences} sequences and {num_indices} document indices)"
        raise _damaged(path, what, f"{size} bytes, or {size + num_sequences} with modes", file_size)
    return dtype, num_sequences, num_indices


def _parse_arrays(
    path: Path, index: bytes, num_sequences: int, num_indices: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    offset = _HEADER.size
    arrays = []
    for dtype, count in (("<i4", num_sequences), ("<i8", num_sequences), ("<i8", num_indices)):
        # After a header of 34 bytes the arrays are unaligned; compiled code needs aligned copies.
        arrays.append(np.frombuffer(index, dtype, count, offset).copy())
        offset += arrays[-1].nbytes
    modes = np.frombuffer(index, np.int8, num_sequences, offset).copy() if len(index) > offset else None
    return arrays[0], arrays[1], arrays[2], modes


def _check_index(
    path: Path, lengths: np.ndarray, pointers: np.ndarray, indices: np.ndarray, ends: np.ndarray, itemsize: int
) -> None:
    if lengths.size and lengths.min() < 0:
        i = int(np.argmax(lengths < 0))
        raise _damaged(path, f"length of sequence {i}", "at least 0", lengths[i])
    expected = (ends - lengths) * itemsize
    if not np.array_equal(pointers, expected):
        i = int(np.argmax(pointers != expected))
        raise _damaged(path, f"byte pointer of sequence {i}", f"{expected[i]} (the lengths before it)", pointers[i])
    steps = np.diff(indices)
    if steps.size and steps.min() < 0:
        i = int(np.argmax(steps < 0))
        raise _damaged(path, f"document index {i + 1}", f"at least {indices[i]} (the one before)", indices[i + 1])
    if indices[0] != 0:
        raise _damaged(path, "document index 0", 0, indices[0])
    if indices[-1] != lengths.size:
        raise _damaged(path, "the last document index", f"{lengths.size} (number of sequences)", indices[-1])


def _map_tokens(bin_path: Path, idx_path: Path, dtype: np.dtype, total_tokens: int) -> np.ndarray:
    try:
        size = bin_path.stat().st_size  # a pipe has size 0
        if size != total_tokens * dtype.itemsize:
            what = f"size ({total_tokens} tokens of {dtype} as {idx_path.name} says)"
            raise _damaged(bin_path, what, f"{total_tokens * dtype.itemsize} bytes", size)
        if size == 0:  # an empty file cannot be mapped
            tokens = np.empty(0, dtype)
            tokens.flags.writeable = False
            return tokens
        # A view as plain ndarray: its slices keep the map alive, and are not np.memmap themselves.
        return np.memmap(bin_path, dtype, mode="r", shape=(total_tokens,)).view(np.ndarray)
    except FileNotFoundError:
        raise InputError(f"{bin_path}: no such file, but {idx_path.name} is there: copy it beside") from None
    except OSError as error:
        raise InputError(f"{bin_path}: cannot be read ({error.strerror})") from error

"""Checksums and vocabulary beside a token file, in PREFIX.crc32.json: by them a flipped bit is found."""

import contextlib
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from fused_megatron.checks import InputError, check
from fused_megatron.durable import replace_file
from fused_megatron.untrusted_files import MOST_JSON_BYTES, Size, parse_json, read_bounded

BLOCK_BYTES = 16 << 20
"""Of the tokens under one checksum: small enough that a message names a place, and that ranks can share the reading."""

SMALL_BYTES = 64 << 20
"""A file up to this size is checked before a run begins (0.1 s or less); a larger one beside the run."""

SUFFIX = ".crc32.json"
_READ_BYTES = 1 << 20
# Between two reads beside a run, which needs the disk, too.
_PAUSE_S = 0.01
# What tells two token files of one size apart without reading them: so many pieces, evenly spread.
_PIECES, _PIECE_BYTES = 16, 64 << 10


@dataclass(frozen=True)
class TokenDigest:
    """Checksums of a .bin and an .idx file.

    Attributes:
        num_bytes: of the .bin file.
        block_bytes: under one checksum.
        blocks: the CRC-32 of each block of the .bin file.
        index: the CRC-32 of the .idx file.
        vocab_size: ids that the tokens are of; None where nobody stated it.
    """

    num_bytes: int
    block_bytes: int
    blocks: tuple[int, ...]
    index: int
    vocab_size: int | None = None


_Crc32 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}\Z")]


class _Record(msgspec.Struct):
    """The JSON of a digest."""

    bin_bytes: Size
    block_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
    bin_crc32: list[_Crc32]
    idx_crc32: _Crc32
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)] | None


class Checksums:
    """The checksums of a stream of bytes, one a block."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self.num_bytes = 0
        self._block_bytes = block_bytes
        self._blocks: list[int] = []

    def update(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        view = memoryview(data).cast("B")
        while len(view):
            filled = self.num_bytes % self._block_bytes
            if filled == 0:
                self._blocks.append(0)
            piece = view[: self._block_bytes - filled]
            self._blocks[-1] = zlib.crc32(piece, self._blocks[-1])
            self.num_bytes += len(piece)
            view = view[len(piece) :]

    def digest(self, index: bytes, vocab_size: int | None) -> TokenDigest:
        """Of all bytes so far, and of an .idx file."""
        return TokenDigest(self.num_bytes, self._block_bytes, tuple(self._blocks), zlib.crc32(index), vocab_size)


def digest_path(prefix: str | os.PathLike[str]) -> Path:
    """Of the digest of a prefix."""
    return Path(os.fspath(prefix) + SUFFIX)


def write_digest(prefix: str | os.PathLike[str], digest: TokenDigest) -> None:
    """Put a digest beside the files, whole or not at all."""
    content = {
        "vocab_size": digest.vocab_size,
        "bin_bytes": digest.num_bytes,
        "block_bytes": digest.block_bytes,
        "idx_crc32": f"{digest.index:08x}",
        "bin_crc32": [f"{checksum:08x}" for checksum in digest.blocks],
    }
    replace_file(digest_path(prefix), json.dumps(content, indent=1).encode())


def add_digest(prefix: str | os.PathLike[str], vocab_size: int | None = None) -> TokenDigest:
    """Make the digest of files as they are, and put it beside them: of datasets that another program wrote.

    Args:
        prefix: of the .bin and the .idx file.
        vocab_size: ids that the tokens are of, where it is known.

    Raises:
        OSError: the files cannot be read, or the digest not be written.
    """
    checksums = Checksums()
    with open(os.fspath(prefix) + ".bin", "rb") as file:
        while data := file.read(_READ_BYTES):
            checksums.update(data)
    digest = checksums.digest(Path(os.fspath(prefix) + ".idx").read_bytes(), vocab_size)
    write_digest(prefix, digest)
    return digest


def read_digest(prefix: str | os.PathLike[str]) -> TokenDigest | None:
    """The digest beside the files of a prefix; None where there is none.

    Raises:
        InputError: it cannot be read, or is damaged.
    """
    path = digest_path(prefix)
    try:
        content = parse_json(read_bounded(path, MOST_JSON_BYTES), _Record)
        blocks = tuple(int(checksum, 16) for checksum in content.bin_crc32)
        check(len(blocks) == -(-content.bin_bytes // content.block_bytes), "not a checksum for each block")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except InputError as error:
        raise InputError(f"{path}: damaged ({error}): copy it again, or remove it to do without checksums") from error
    return TokenDigest(content.bin_bytes, content.block_bytes, blocks, int(content.idx_crc32, 16), content.vocab_size)


def damaged_blocks(
    prefix: str | os.PathLike[str], digest: TokenDigest, blocks: Sequence[int], go_on: Callable[[], bool] = lambda: True
) -> Iterator[str]:
    """What is wrong with the blocks of a .bin file, a line each; reads until go_on() is False.

    Raises:
        InputError: it cannot be read, which is no damage: an OSError is the cause.

    Memory: 1 MB.
    """
    path = os.fspath(prefix) + ".bin"
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != digest.num_bytes:
                yield _wrong(prefix, f"{size} bytes long, must be {digest.num_bytes}")
                return
            for block in blocks:
                start, end = block * digest.block_bytes, min(size, (block + 1) * digest.block_bytes)
                checksum = 0
                for position in range(start, end, _READ_BYTES):
                    if not go_on():
                        return
                    checksum = zlib.crc32(os.pread(file.fileno(), min(_READ_BYTES, end - position), position), checksum)
                if checksum != digest.blocks[block]:
                    found, wanted = f"{checksum:08x}", f"{digest.blocks[block]:08x}"
                    yield _wrong(prefix, f"the checksum of bytes {start} to {end} is {found}, must be {wanted}")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def check_small(prefix: str | os.PathLike[str], digest: TokenDigest | None) -> None:
    """Raise InputError where a .bin file that is read in a moment is damaged, or cannot be read."""
    if digest is not None and digest.num_bytes <= SMALL_BYTES:
        for problem in damaged_blocks(prefix, digest, range(len(digest.blocks))):
            raise InputError(problem)


def check_index(prefix: str | os.PathLike[str], digest: TokenDigest, index: bytes) -> None:
    """Raise InputError unless these are the bytes of the .idx file that the digest was made with."""
    if zlib.crc32(index) != digest.index:
        found, wanted = f"{zlib.crc32(index):08x}", f"{digest.index:08x}"
        raise InputError(_wrong(prefix, f"its checksum is {found}, must be {wanted}", ".idx"))


def _wrong(prefix: str | os.PathLike[str], what: str, suffix: str = ".bin") -> str:
    return (
        f"{os.fspath(prefix)}{suffix}: {what}: the data is damaged: copy or build it again (where another program "
        f"wrote it anew, remove {digest_path(prefix).name})"
    )


class TokenCheck:
    """Reads token files beside the training and compares their checksums: a thread that reads 100 MB/s at most.

    Args:
        files: prefixes and their digests; each is read once.
        share, of: which part of the blocks: the ranks of a machine share them.

    Attributes:
        problem: the first thing that was found wrong.
    """

    def __init__(self, files: Sequence[tuple[str, TokenDigest]], share: int = 0, of: int = 1) -> None:
        self.problem: str | None = None
        self._files = dict(files)
        self._share, self._of = share, of
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="token-check")

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def wait(self) -> str | None:
        """The problem, when all is read."""
        self._thread.join()
        return self.problem

    def close(self) -> None:
        """Stop reading."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        for prefix, digest in self._files.items():
            blocks = range(self._share, len(digest.blocks), self._of)
            with contextlib.suppress(InputError):  # what cannot be read now is no damage
                for problem in damaged_blocks(prefix, digest, blocks, lambda: not self._closed.wait(_PAUSE_S)):
                    self.problem = problem
                    return


def spread_digest(prefixes: Sequence[str]) -> str:
    """Hash of the sizes and of 1 MB at most of each .bin file, evenly spread: files of other tokens have another.

    Raises:
        InputError: a file cannot be read.
    """
    found = hashlib.sha256()
    for prefix in prefixes:
        path = prefix + ".bin"
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                found.update(b"%d " % size)
                for piece in range(_PIECES):
                    start = piece * max(0, size - _PIECE_BYTES) // (_PIECES - 1)
                    found.update(os.pread(file.fileno(), _PIECE_BYTES, start))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return found.hexdigest()

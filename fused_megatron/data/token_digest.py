"""Checksums of token files, kept with the vocabulary size in PREFIX.crc32.json, and the search for damaged blocks."""

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
"""Bytes under one checksum: few enough that a message locates the damage and that ranks can share the reading."""

SMALL_BYTES = 64 << 20
"""A file up to this size is checked before a run begins (0.1 s or less); a larger file is checked during the run."""

SUFFIX = ".crc32.json"
_READ_BYTES = 1 << 20
# Pause between two reads during a run, which needs the disk too.
_PAUSE_S = 0.01
# Evenly spread pieces that spread_digest hashes, instead of the whole file.
_PIECES = 16
_PIECE_BYTES = 64 << 10


@dataclass(frozen=True)
class TokenDigest:
    """Checksums of a .bin and an .idx file.

    Attributes:
        num_bytes: size of the .bin file.
        block_bytes: size of a block; the last block may be smaller.
        blocks: the CRC-32 of each block of the .bin file.
        index: the CRC-32 of the .idx file.
        vocab_size: size of the vocabulary of the tokens; None if it is unknown.
    """

    num_bytes: int
    block_bytes: int
    blocks: tuple[int, ...]
    index: int
    vocab_size: int | None = None


_Crc32 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}\Z")]


class _Record(msgspec.Struct):
    """The JSON schema of a digest."""

    bin_bytes: Size
    block_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
    bin_crc32: list[_Crc32]
    idx_crc32: _Crc32
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)] | None


class Checksums:
    """The checksums of a stream of bytes, one per block."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self.num_bytes = 0
        self._block_bytes = block_bytes
        self._blocks: list[int] = []

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes."""
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
        """Return the digest of all bytes so far and of an .idx file."""
        return TokenDigest(self.num_bytes, self._block_bytes, tuple(self._blocks), zlib.crc32(index), vocab_size)


def digest_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the path of the digest of a dataset prefix."""
    return Path(os.fspath(prefix) + SUFFIX)


def write_digest(prefix: str | os.PathLike[str], digest: TokenDigest) -> None:
    """Write a digest beside the files, atomically."""
    content = {
        "vocab_size": digest.vocab_size,
        "bin_bytes": digest.num_bytes,
        "block_bytes": digest.block_bytes,
        "idx_crc32": f"{digest.index:08x}",
        "bin_crc32": [f"{checksum:08x}" for checksum in digest.blocks],
    }
    replace_file(digest_path(prefix), json.dumps(content, indent=1).encode())


def add_digest(prefix: str | os.PathLike[str], vocab_size: int | None = None) -> TokenDigest:
    """Make and write the digest of existing files, for datasets that another program wrote.

    Args:
        prefix: prefix of the .bin and the .idx file.
        vocab_size: size of the vocabulary of the tokens; None if it is unknown.

    Raises:
        OSError: the files cannot be read, or the digest cannot be written.
    """
    checksums = Checksums()
    with open(os.fspath(prefix) + ".bin", "rb") as file:
        while data := file.read(_READ_BYTES):
            checksums.update(data)
    digest = checksums.digest(Path(os.fspath(prefix) + ".idx").read_bytes(), vocab_size)
    write_digest(prefix, digest)
    return digest


def read_digest(prefix: str | os.PathLike[str]) -> TokenDigest | None:
    """Read the digest of a dataset prefix; None if there is none.

    Raises:
        InputError: the digest cannot be read, or is damaged.
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
    """Yield a message for each damaged block of a .bin file, or one if its size is wrong.

    Args:
        prefix: prefix of the .bin file.
        digest: its checksums.
        blocks: numbers of the blocks to read.
        go_on: reading stops when it returns False.

    Raises:
        InputError: the file cannot be read. This is no damage: the cause is an OSError.

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
    """Raise InputError if a .bin file of at most SMALL_BYTES is damaged or cannot be read."""
    if digest is not None and digest.num_bytes <= SMALL_BYTES:
        for problem in damaged_blocks(prefix, digest, range(len(digest.blocks))):
            raise InputError(problem)


def check_index(prefix: str | os.PathLike[str], digest: TokenDigest, index: bytes) -> None:
    """Raise InputError if the bytes of an .idx file do not match the digest."""
    if zlib.crc32(index) != digest.index:
        found, wanted = f"{zlib.crc32(index):08x}", f"{digest.index:08x}"
        raise InputError(_wrong(prefix, f"its checksum is {found}, must be {wanted}", ".idx"))


def _wrong(prefix: str | os.PathLike[str], what: str, suffix: str = ".bin") -> str:
    return (
        f"{os.fspath(prefix)}{suffix}: {what}: the data is damaged: copy or build it again (where another program "
        f"wrote it anew, remove {digest_path(prefix).name})"
    )


class TokenCheck:
    """A thread that reads token files during training, at most 100 MB/s, and compares them with their checksums.

    Args:
        files: prefixes and their digests; each file is read once.
        share: read only the blocks number share, share + of, ... : the ranks of a machine share the blocks.
        of: number of shares.

    Attributes:
        problem: message of the first damage; None if there is none so far.
    """

    def __init__(self, files: Sequence[tuple[str, TokenDigest]], share: int = 0, of: int = 1) -> None:
        self.problem: str | None = None
        self._files = dict(files)
        self._share = share
        self._of = of
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="token-check")

    def start(self) -> None:
        """Start reading."""
        self._thread.start()

    def wait(self) -> str | None:
        """Wait until all is read, and return the problem."""
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
            with contextlib.suppress(InputError):  # a file that cannot be read now is not damaged
                for problem in damaged_blocks(prefix, digest, blocks, lambda: not self._closed.wait(_PAUSE_S)):
                    self.problem = problem
                    return


def spread_digest(prefixes: Sequence[str]) -> str:
    """Return a hash of the size of each .bin file and of evenly spread pieces of it (1 MB at most).

    It tells files with other tokens apart without reading them.

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

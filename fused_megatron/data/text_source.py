"""Text files as a source of documents, in a fixed order."""

import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fused_megatron.checks import InputError, check
from fused_megatron.observe.free_memory import memory_bytes

_UTF8_BOM = b"\xef\xbb\xbf"

MOST_LINE_BYTES = 64 << 20
"""Longest line of a .jsonl file: longer than any document. Parsing takes some 9 times as much memory."""

# Of a document beside its bytes: the text, its two parts (training, held out), its tokens. Python keeps a text that has
# one character beyond Latin-1 with two or four bytes for each.
_COPIES, _WIDE_COPIES = 4, 10


@dataclass
class TextSource:
    """Text files in a fixed order.

    Each file is one document, except that each line of a .jsonl file is one (its field "text"). A byte order mark at
    the start of a file is dropped, line ends are kept, and empty documents are left out.

    Attributes:
        description: name of the text, for messages.
        files: (name, path) in order; a name identifies the file on every machine.
        skip_undecodable: skip files that are not UTF-8 instead of raising, for text that the user did not choose.
        skipped: names of the files skipped so far.
    """

    description: str
    files: list[tuple[str, Path]]
    skip_undecodable: bool = False
    skipped: set[str] = field(default_factory=set)

    def documents(self) -> Iterator[str]:
        """Yield the documents in order.

        Raises:
            InputError: a file cannot be read or is not UTF-8, or a .jsonl line is no JSON object with a field "text".
        """
        for name, path in self.files:
            if path.suffix == ".jsonl":
                yield from _jsonl_documents(path)
                continue
            text = self._read(name, path)
            if text:
                yield text

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Return (name, size, modification time in ns) of every file, which changes when a file is touched."""
        stats = [(name, path.stat()) for name, path in self.files]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def total_bytes(self) -> int:
        """Return the size of all files."""
        return sum(path.stat().st_size for _, path in self.files)

    def _read(self, name: str, path: Path) -> str:
        try:
            _check_room(path, path.stat().st_size, 1)
            content = path.read_bytes()
            _check_room(path, len(content), _COPIES if content.isascii() else _WIDE_COPIES)
            return content.removeprefix(_UTF8_BOM).decode()
        except UnicodeDecodeError as error:
            if self.skip_undecodable:
                self.skipped.add(name)
                return ""
            raise InputError(
                f"{path}: not UTF-8 at byte {error.start} ({error.reason}): convert the file, or leave it out"
            ) from None
        except OSError as error:
            if self.skip_undecodable:
                self.skipped.add(name)
                return ""
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _check_room(path: Path, num_bytes: int, copies: int) -> None:
    """A large document must leave memory for what is made of it."""
    needed, free = num_bytes * copies, memory_bytes()[1] if num_bytes > MOST_LINE_BYTES else 0.0
    check(
        needed <= free or not free,
        f"{path}: a document of {num_bytes / 1e9:.1f} GB, of which {needed / 1e9:.1f} GB are made in memory, and "
        f"{free / 1e9:.1f} GB are free: divide it into several files, or into lines of a .jsonl file",
    )


def standard_library_source() -> TextSource:
    """Return the sources of the Python standard library on this machine."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "__pycache__"}
    files = [(name, path) for name, path in _walk(root, skip) if path.suffix == ".py"]
    check(
        bool(files),
        f"{root}: no sources of Python's standard library there, which are the default text: give data.path",
    )
    return TextSource("the Python standard library's sources", files, skip_undecodable=True)


def path_source(path: str | os.PathLike[str]) -> TextSource:
    """Return a text file, a .jsonl file, or a folder of both (all files except hidden ones) as a source.

    Raises:
        InputError: the path does not exist, or all files are empty.
    """
    root = Path(path).expanduser()
    check(root.exists(), f"data.path={path}: no such file, folder or indexed dataset (PATH.bin with PATH.idx)")
    if root.is_dir():
        files = list(_walk(root, {"__pycache__"}))
        check(bool(files), f"data.path={path}: the folder holds no files")
        indexed = [file for _, file in files if file.suffix == ".idx"]
        if indexed:
            raise InputError(
                f"data.path={path}: the folder holds an indexed dataset: give its prefix, {indexed[0].with_suffix('')}"
            )
    else:
        check(root.is_file(), f"data.path={path}: neither a file nor a folder")
        files = [(root.name, root)]
    source = TextSource(str(path), files)
    check(source.total_bytes() > 0, f"data.path={path}: there is no text in it (0 bytes)")
    return source


def _walk(root: Path, skip: set[str]) -> Iterator[tuple[str, Path]]:
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        names += [os.path.join(folder, name) for name in files if not name.startswith(".")]
    for name in sorted(Path(name).relative_to(root).as_posix() for name in names):
        if (root / name).is_file():
            yield name, root / name


def _jsonl_documents(path: Path) -> Iterator[str]:
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MOST_LINE_BYTES + 1):
                number += 1
                check(
                    len(line) <= MOST_LINE_BYTES,
                    f"{path}:{number}: a line of more than {MOST_LINE_BYTES} bytes, of which each becomes several of "
                    f"memory: divide the document into several lines",
                )
                line = line.removeprefix(_UTF8_BOM).strip()
                if line:
                    text = _jsonl_text(f"{path}:{number}", line)
                    if text:
                        yield text
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _jsonl_text(where: str, line: bytes) -> str:
    wanted = 'each line must be a JSON object with a field "text"'
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start} of the line; {wanted}") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); {wanted}") from None
    except RecursionError:
        raise InputError(f"{where}: JSON nested too deeply; {wanted}") from None
    check(isinstance(record, dict), f"{where}: a JSON {type(record).__name__}; {wanted}")
    fields = ", ".join(ascii(name)[1:-1] for name in sorted(record)[:10]) or "none"
    check("text" in record, f"{where}: no field text (fields: {fields:.200}); {wanted}")
    text = record["text"]
    check(isinstance(text, str), f"{where}: field text holds {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: half of a surrogate pair in the text, which UTF-8 cannot hold") from None
    return text

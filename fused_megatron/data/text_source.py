"""Text files as a source of documents, in a fixed order."""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fused_megatron.checks import InputError, check
from fused_megatron.data.document_files import check_format, file_documents


@dataclass
class TextSource:
    """Text files in a fixed order.

    Each file is one document, except that each line of a .jsonl file, and each row of a table, is one. A byte order
    mark at the start of a file is dropped, line ends are kept, and empty documents are left out.

    Attributes:
        description: name of the text, for messages.
        files: (name, path) in order; a name identifies the file on every machine.
        skip_undecodable: skip files that are not UTF-8 instead of raising, for text that the user did not choose.
        skipped: names of the files skipped so far.
        text_field: field of a line of .jsonl, or column of a table, that holds the text.
    """

    description: str
    files: list[tuple[str, Path]]
    skip_undecodable: bool = False
    skipped: set[str] = field(default_factory=set)
    text_field: str = "text"

    def documents(self) -> Iterator[str]:
        """Yield the documents in order.

        Raises:
            InputError: a file cannot be read or is not UTF-8, or a .jsonl line or a row has no such field.
        """
        for name, path in self.files:
            try:
                yield from file_documents(path, self.text_field)
            except InputError as error:
                if not (self.skip_undecodable and isinstance(error.__cause__, OSError | UnicodeDecodeError)):
                    raise
                self.skipped.add(name)

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Return (name, size, modification time in ns) of every file, which changes when a file is touched."""
        stats = [(name, path.stat()) for name, path in self.files]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def total_bytes(self) -> int:
        """Return the size of all files."""
        return sum(path.stat().st_size for _, path in self.files)


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


def path_source(path: str | os.PathLike[str], text_field: str = "text") -> TextSource:
    """Return a file that file_documents reads, or a folder of such files (all except hidden ones), as a source.

    Args:
        path: the file or folder.
        text_field: as in file_documents.

    Raises:
        InputError: the path does not exist, all files are empty, or a file has a format that cannot be read.
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
    for _, file in files:
        check_format(file)
    source = TextSource(str(path), files, text_field=text_field)
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

"""Documents of a file, by the format that its name ends with: text, .jsonl, both with .gz, and tables by `datasets`."""

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from fused_megatron.checks import InputError, check
from fused_megatron.observe.free_memory import memory_bytes
from fused_megatron.optional_packages import install_command

_UTF8_BOM = b"\xef\xbb\xbf"

MOST_LINE_BYTES = 64 << 20
"""Longest line of a .jsonl file: longer than any document. Parsing takes some 9 times as much memory."""

# Of a document beside its bytes: the text, its two parts (training, held out), its tokens. Python keeps a text that has
# one character beyond Latin-1 with two or four bytes for each.
_COPIES, _WIDE_COPIES = 4, 10
_READ_BYTES = 16 << 20
# Formats of tables, and the builder of the package datasets that reads them.
_TABLES = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".arrow": "arrow"}
# Formats that hold other things than text, and would be trained on as text or stop at their first byte.
_REFUSED = {
    ".zst": "unpack it first (zstd -d)",
    ".xz": "unpack it first (xz -d)",
    ".bz2": "unpack it first (bzip2 -d)",
    ".zip": "unpack it first (unzip)",
    ".tar": "unpack it first (tar -xf)",
    ".tgz": "unpack it first (tar -xzf)",
    ".tsv": "turn it into .csv or .jsonl",
    ".npy": "write it as an indexed dataset (data/indexed_dataset.py)",
    ".pdf": "turn it into text",
}


def is_lines(path: Path) -> bool:
    """Whether each line of the file is a document, so that a part of the file can be read."""
    return path.suffix == ".jsonl"


def check_format(path: Path) -> None:
    """Raise InputError, which names the way out, if files of this name cannot be read as documents."""
    suffix = _format_of(path)
    for known, way_out in _REFUSED.items():
        check(suffix != known, f"{path}: a {known} file holds no documents that can be read here: {way_out}")
    if suffix in _TABLES:
        _import_datasets(path)


def file_documents(path: Path, text_field: str = "text", start: int = 0, end: int | None = None) -> Iterator[str]:
    """Yield the documents of a file in order; a text file is one document.

    Args:
        path: the file. `.jsonl` has a JSON object a line, `.gz` is unpacked, and `.parquet`, `.csv`, `.json` and
            `.arrow` are tables that the package datasets reads. Any other name: text.
        text_field: the field of an object, or the column of a table, that holds the text.
        start, end: of a .jsonl file only the lines that begin in these bytes; end None: up to the end.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or has no such field.
    """
    check_format(path)
    suffix = _format_of(path)
    try:
        if suffix == ".jsonl":
            with _opened(path) as file:
                yield from _jsonl_documents(file, path, text_field, start, end)
        elif suffix in _TABLES:
            yield from _table_documents(path, _TABLES[suffix], text_field)
        else:
            text = _whole_text(path)
            if text:
                yield text
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a whole .gz file ({error}): copy it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _format_of(path: Path) -> str:
    """Return the suffix that tells the format: of x.jsonl.gz, ".jsonl"."""
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _opened(path: Path) -> IO[bytes]:
    file = open(path, "rb")  # noqa: SIM115 (closed by the caller)
    return cast(IO[bytes], gzip.GzipFile(fileobj=file, mode="rb")) if path.suffix == ".gz" else file


def _whole_text(path: Path) -> str:
    _check_room(path, path.stat().st_size, 1)
    parts, size = [], 0
    with _opened(path) as file:
        while part := file.read(_READ_BYTES):
            parts.append(part)
            size += len(part)
            if path.suffix == ".gz":  # a small file may hold a text that fills any memory
                _check_room(path, size, 2)
    content = b"".join(parts)
    _check_room(path, len(content), _COPIES if content.isascii() else _WIDE_COPIES)
    try:
        return content.removeprefix(_UTF8_BOM).decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 at byte {error.start} ({error.reason}): convert the file, or leave it out"
        ) from error


def _check_room(path: Path, num_bytes: int, copies: int) -> None:
    """A large document must leave memory for what is made of it."""
    needed, free = num_bytes * copies, memory_bytes()[1] if num_bytes > MOST_LINE_BYTES else 0.0
    check(
        needed <= free or not free,
        f"{path}: a document of {num_bytes / 1e9:.1f} GB, of which {needed / 1e9:.1f} GB are made in memory, and "
        f"{free / 1e9:.1f} GB are free: divide it into several files, or into lines of a .jsonl file",
    )


def _jsonl_documents(file: IO[bytes], path: Path, text_field: str, start: int, end: int | None) -> Iterator[str]:
    position = start
    if start > 0:
        # The line that begins before the part belongs to the part before.
        file.seek(start - 1)
        position = start - 1
        while line := file.readline(_READ_BYTES):
            position += len(line)
            if line.endswith(b"\n"):
                break
    number = 0
    while (end is None or position < end) and (line := file.readline(MOST_LINE_BYTES + 1)):
        number += 1
        where = f"{path}:{number}" if start == 0 else f"{path}, byte {position}"
        position += len(line)
        check(
            len(line) <= MOST_LINE_BYTES,
            f"{where}: a line of more than {MOST_LINE_BYTES} bytes, of which each becomes several of memory: divide "
            f"the document into several lines",
        )
        line = line.removeprefix(_UTF8_BOM).strip()
        if line:
            text = _jsonl_text(where, line, text_field)
            if text:
                yield text


def _jsonl_text(where: str, line: bytes, text_field: str) -> str:
    wanted = f'each line must be a JSON object with a field "{text_field}"'
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start} of the line; {wanted}") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); {wanted}") from None
    except RecursionError:
        raise InputError(f"{where}: JSON nested too deeply; {wanted}") from None
    check(isinstance(record, dict), f"{where}: a JSON {type(record).__name__}; {wanted}")
    return _text_of(where, record, text_field, wanted)


def _text_of(where: str, record: dict[str, Any], text_field: str, wanted: str) -> str:
    fields = ", ".join(ascii(name)[1:-1] for name in sorted(record)[:10]) or "none"
    check(
        text_field in record,
        f"{where}: no field {text_field} (fields: {fields:.200}); {wanted} (data.text_field names another)",
    )
    text = record[text_field]
    check(isinstance(text, str), f"{where}: field {text_field} holds {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: half of a surrogate pair in the text, which UTF-8 cannot hold") from None
    return text


def _table_documents(path: Path, builder: str, text_field: str) -> Iterator[str]:
    datasets = _import_datasets(path)
    with _library_errors(path):
        # Streaming: nothing is copied to a cache, and one group of rows is in memory at a time.
        rows = iter(datasets.load_dataset(builder, data_files=os.fspath(path), split="train", streaming=True))
    number = 0
    while True:
        with _library_errors(path):
            row = next(rows, None)
        if row is None:
            return
        number += 1
        text = row.get(text_field)
        if text_field in row and text is None:
            continue  # an empty cell
        text = _text_of(f"{path}, row {number}", row, text_field, f"a row must have a column {text_field!r}")
        if text:
            yield text


@contextlib.contextmanager
def _library_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        found = error.__cause__ or error
        raise InputError(f"{path}: cannot be read ({' '.join(str(found).split())[:200]})") from error


def _import_datasets(path: Path) -> Any:
    try:
        # It must not look for data on the network: only local files are read.
        import datasets  # noqa: PLC0415 (an extra, and slow to import)
    except ImportError:
        raise InputError(
            f"{path}: {_format_of(path)} files are read by the package datasets: {install_command('datasets')} "
            f"(without it: .jsonl or text, also with .gz)"
        ) from None
    return datasets

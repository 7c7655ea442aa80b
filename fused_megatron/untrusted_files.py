"""Safe reading of untrusted files: no blocking on pipes, a limit on the size, JSON and TOML checked on the way."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec

from fused_megatron.checks import InputError, check

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

MOST_JSON_BYTES = 64 << 20
"""Limit of a JSON file. Real ones have some kilobytes; the parsed value takes up to 20 times the file's bytes."""

BLOCK_BYTES = 4 << 20
"""Bytes of one read: large enough that the system calls cost nothing, small beside any memory limit."""
COPY_AGAIN = "copy or download it again"

# More than any tensor or dataset has; multiplied by the size of an element it still fits in 64 bits.
MOST_ELEMENTS = 1 << 59
Size = Annotated[int, msgspec.Meta(ge=0, le=MOST_ELEMENTS)]
Shape = Annotated[tuple[Size, ...], msgspec.Meta(max_length=64)]

# Text that is safe to print: no control characters, no change of text direction, no halves of surrogate pairs.
_SHOWN = r"^[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]*\Z"
ShownText = Annotated[str, msgspec.Meta(max_length=1000, pattern=_SHOWN)]


def open_plain_file(path: Path, *, follow_links: bool = True, write: bool = False) -> int:
    """Open a regular file for reading, or (write=True) for reading and writing, and return its descriptor.

    Args:
        path: of the file.
        follow_links: whether the file may be a link.
        write: make the file if it does not exist.

    Raises:
        OSError: the file does not exist; it is a pipe, a device or a folder (ENXIO); it is a link and follow_links is
            False.
    """
    # O_NONBLOCK: opening a pipe would otherwise block before it can be refused.
    flags = os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags | (os.O_RDWR | os.O_CREAT if write else os.O_RDONLY), 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, "not a plain file", os.fspath(path))
    return descriptor


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: as open_plain_file; EFBIG, before reading, if the file is larger than most_bytes.
    """
    with open(open_plain_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most_bytes + 1) if size <= most_bytes else b""
        if max(size, len(content)) > most_bytes:
            raise OSError(errno.EFBIG, f"{size} bytes, must be {most_bytes} at most", os.fspath(path))
        return content


def parse_json(content: bytes | str, schema: type[T], *, finite: bool = True) -> T:
    """Parse a JSON text into a value of the schema.

    Python's parser is used although msgspec's is faster: msgspec refuses file names that are not valid UTF-8, which
    checkpoints and caches may contain.

    Args:
        content: the JSON text.
        schema: a type that msgspec can convert to, for example a dataclass or a dict.
        finite: refuse NaN and Infinity. Configs written by transformers contain them.

    Raises:
        InputError: one line: invalid JSON, a number that is not finite, or the path at which the schema does not match.
    """
    try:
        strict: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite} if finite else {}
        value = json.loads(content, **strict)
        return msgspec.convert(value, schema)
    except RecursionError:
        raise InputError("JSON nested too deeply") from None
    except msgspec.ValidationError as error:
        raise InputError(_explained(error)) from None
    except ValueError as error:  # JSONDecodeError, UnicodeError, or a number with too many digits
        raise InputError(f"no JSON, or cut off ({' '.join(str(error).split())})") from None


def parse_toml(content: bytes) -> dict[str, Any]:
    """Parse a TOML text.

    Raises:
        InputError: one line: it is no TOML, or nested too deeply.
    """
    try:
        return tomllib.loads(content.decode())
    except RecursionError:
        raise InputError("no TOML: nested too deeply") from None
    except ValueError as error:  # a TOMLDecodeError, text that is not UTF-8, or a number of thousands of digits
        raise InputError(f"no TOML: {' '.join(str(error).split())}") from None


def convert(value: Any, schema: type[T]) -> T:
    """Convert a value from parse_json to a narrower schema.

    Raises:
        InputError: one line: the path at which the schema does not match.
    """
    try:
        return msgspec.convert(value, schema)
    except RecursionError:
        raise InputError("nested too deeply") from None
    except ValueError as error:
        raise InputError(_explained(error)) from None


def _explained(error: Exception) -> str:
    """Return the error as one short line, without the regular expression, which would not help the user."""
    line = re.sub(r" matching regex '.*'", " of the right form", " ".join(str(error).split()))
    return line if len(line) <= 400 else f"{line[:200]} ... {line[-150:]}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is out of range")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        InputError: the file cannot be read, or does not contain a JSON object.
    """
    try:
        content = read_bounded(path, MOST_JSON_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    try:
        value = parse_json(content, object, finite=False)
    except InputError as error:
        raise InputError(f"{path} is {error}: {COPY_AGAIN}") from None
    check(isinstance(value, dict), f"{path} must hold a JSON object, not {type(value).__name__}")
    assert isinstance(value, dict)
    return value

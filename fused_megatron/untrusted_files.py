"""Files that anybody may have made: opened without waiting, bounded before they are read, their JSON checked whole."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec

from fused_megatron.checks import InputError

T = TypeVar("T")

MOST_JSON_BYTES = 64 << 20
"""Of a JSON file that describes something, which has some kilobytes; parsed it takes up to 20 times as much."""

# Far beyond any tensor or dataset; products with the size of an element still fit in 64 bits.
MOST_ELEMENTS = 1 << 59
Size = Annotated[int, msgspec.Meta(ge=0, le=MOST_ELEMENTS)]
Shape = Annotated[tuple[Size, ...], msgspec.Meta(max_length=64)]

# What a terminal shows as it is: no control characters, no change of direction, no halves of surrogate pairs.
_SHOWN = r"^[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]*\Z"
ShownText = Annotated[str, msgspec.Meta(max_length=1000, pattern=_SHOWN)]


def open_plain_file(path: Path, *, follow_links: bool = True) -> int:
    """Descriptor for reading.

    Raises:
        OSError: there is none, or it is a pipe, a device, a folder (ENXIO), or a link where these are not followed.
    """
    # O_NONBLOCK: a pipe in the place of a file must not hang the reader before it is refused.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, "not a plain file", os.fspath(path))
    return descriptor


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """The content of a plain file.

    Raises:
        OSError: as of open_plain_file; EFBIG where it is larger than most_bytes, of which nothing was read.
    """
    with open(open_plain_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most_bytes + 1) if size <= most_bytes else b""
        if max(size, len(content)) > most_bytes:
            raise OSError(errno.EFBIG, f"{size} bytes, must be {most_bytes} at most", os.fspath(path))
        return content


def parse_json(content: bytes | str, schema: type[T], *, finite: bool = True) -> T:
    """What a JSON text holds, as a value of the schema: a type that msgspec knows, as a dataclass or a dict.

    Python's reader, and not the faster one of msgspec, which refuses names that UTF-8 cannot hold: checkpoints and
    caches may hold such names of files. Not finite: NaN and Infinity are taken, which configs of transformers have.

    Raises:
        InputError: one line: no JSON, NaN and other numbers that are none, or the place where it is not of the schema.
    """
    try:
        strict: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite} if finite else {}
        value = json.loads(content, **strict)
        return msgspec.convert(value, schema)
    except RecursionError:
        raise InputError("JSON nested too deeply") from None
    except msgspec.ValidationError as error:
        raise InputError(_explained(error)) from None
    except ValueError as error:  # of a JSONDecodeError, a UnicodeError, a number of too many digits
        raise InputError(f"no JSON, or cut off ({' '.join(str(error).split())})") from None


def convert(value: Any, schema: type[T]) -> T:
    """A value that parse_json gave, as one of a narrower schema.

    Raises:
        InputError: one line: the place where it is not of the schema.
    """
    try:
        return msgspec.convert(value, schema)
    except RecursionError:
        raise InputError("nested too deeply") from None
    except ValueError as error:
        raise InputError(_explained(error)) from None


def _explained(error: Exception) -> str:
    """The error in one short line; a pattern says nothing to who did not write it."""
    line = re.sub(r" matching regex '.*'", " of the right form", " ".join(str(error).split()))
    return line if len(line) <= 400 else f"{line[:200]} ... {line[-150:]}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is out of range")
    return value

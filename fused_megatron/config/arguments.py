"""Command-line arguments parsed into dataclasses by tyro, with one clear line for every error."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from fused_megatron.checks import InputError

T = TypeVar("T")

# Every option is `--key value`, also a bool, so that files and the command line have the same form.
_CONFIG = (tyro.conf.FlagConversionOff,)


def parse_arguments(target: type[T], arguments: Sequence[str], source: str, default: T | None = None) -> T:
    """Parse arguments such as `--section.key value` into the dataclass `target`; the last value of a key wins.

    Args:
        target: the dataclass.
        arguments: the command-line arguments.
        source: origin of the arguments, for messages.
        default: supplies the values of missing keys, and the classes of the sections; None: the defaults of target.

    Raises:
        InputError: an argument is unknown or missing, or a value does not fit its key.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return tyro.cli(target, args=list(arguments), config=_CONFIG, **_default_keyword(default))
    except SystemExit:
        raise InputError(f"{source}: {_message_in_box(printed.getvalue())}") from None


def print_arguments(target: type[T], program: str, default: T | None = None) -> None:
    """Print every option with its type, meaning and default; `default` as in parse_arguments."""
    with contextlib.suppress(SystemExit):
        tyro.cli(target, args=["--help"], prog=program, config=_CONFIG, **_default_keyword(default))


def _default_keyword(default: object) -> dict[str, Any]:
    return {} if default is None else {"default": default}


def _message_in_box(box: str) -> str:
    """Return tyro's message as one line, without the box around it and the hints below it."""
    lines = [line.strip("\u2502| ") for line in box.splitlines()]
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if re.search("(\u2500|-){8}", line):  # a horizontal rule; the first one contains or follows the title
            paragraphs.append([])
        elif line:
            paragraphs[-1].append(line)
    return next((" ".join(lines) for lines in paragraphs[1:] if lines), box.strip())

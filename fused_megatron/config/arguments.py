"""Command-line words to dataclasses (by tyro), with one line for every mistake."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from fused_megatron.checks import InputError

T = TypeVar("T")

# Every option is `--key value`, also a bool: in files and on the command line alike.
_CONFIG = (tyro.conf.FlagConversionOff,)


def parse_arguments(target: type[T], words: Sequence[str], source: str, default: T | None = None) -> T:
    """The dataclass `target` from words such as `--section.key value`; the last one of a key wins.

    Args:
        source: what the words come from, for messages.
        default: the values of keys that no word names, and the classes of the sections; None: those of target.

    Raises:
        InputError: unknown or missing words, and values that do not fit.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return tyro.cli(target, args=list(words), config=_CONFIG, **_given(default))
    except SystemExit:
        raise InputError(f"{source}: {_message_in_box(printed.getvalue())}") from None


def print_arguments(target: type[T], program: str, default: T | None = None) -> None:
    """Print every option with its type, meaning and default, which is that of `default` where it is given."""
    with contextlib.suppress(SystemExit):
        tyro.cli(target, args=["--help"], prog=program, config=_CONFIG, **_given(default))


def _given(default: object) -> dict[str, Any]:
    return {} if default is None else {"default": default}


def _message_in_box(box: str) -> str:
    """tyro's message as one line, without the box around it and the hints below it."""
    lines = [line.strip("\u2502| ") for line in box.splitlines()]
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if re.search("(\u2500|-){8}", line):  # a rule: the first is below or holds the title
            paragraphs.append([])
        elif line:
            paragraphs[-1].append(line)
    return next((" ".join(words) for words in paragraphs[1:] if words), box.strip())

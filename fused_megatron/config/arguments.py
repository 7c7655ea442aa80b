"""Command-line arguments and TOML values parsed into dataclasses, with all mistakes in one line; tyro prints help."""

import contextlib
import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from fused_megatron.checks import InputError

T = TypeVar("T")

# Every option is `--key value`, also a bool, so that files and the command line have the same form.
_CONFIG = (tyro.conf.FlagConversionOff,)
_NONE_WORDS = ("none", "null")
_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


@dataclasses.dataclass(frozen=True)
class Argument:
    """A key of a config, or an argument of a command.

    Attributes:
        name: of the field, behind its section if it has one: "training.num_steps".
        kind: its type.
        positional: whether it is given without its name.
        default: None if it is required.
        required: whether it has no default.
    """

    name: str
    kind: Any
    positional: bool
    default: Any
    required: bool

    @property
    def option(self) -> str:
        """The option as the help names it; of a positional argument its name in capitals."""
        return self.name.upper() if self.positional else f"--{self.name.replace('_', '-')}"

    @property
    def takes_many(self) -> bool:
        """Whether it takes a list of values."""
        return any(typing.get_origin(kind) is tuple for kind in _alternatives(self.kind))

    def from_text(self, words: Sequence[str]) -> Any:
        """Convert words of the command line; ValueError names what is wanted."""
        (first, *more) = words
        kinds = _alternatives(self.kind)
        if not more and type(None) in kinds and first.lower() in _NONE_WORDS:
            return None
        for kind in kinds:
            if typing.get_origin(kind) is not tuple and not more:
                with contextlib.suppress(ValueError):
                    return _word_as(first, kind)
        for kind in kinds:
            if typing.get_origin(kind) is tuple:
                with contextlib.suppress(ValueError):
                    return tuple(_word_as(word, typing.get_args(kind)[0]) for word in words)
        raise ValueError(_wanted(kinds))

    def from_toml(self, value: Any) -> Any:
        """Check a value of a TOML file; ValueError names what is wanted."""
        kinds = _alternatives(self.kind)
        for kind in kinds:
            with contextlib.suppress(ValueError):
                if typing.get_origin(kind) is not tuple:
                    return _item_as(value, kind)
                if isinstance(value, list):
                    return tuple(_item_as(item, typing.get_args(kind)[0]) for item in value)
        raise ValueError(_wanted(kinds))


def arguments_of(target: Any, default: Any = None) -> dict[str, Argument]:
    """Return the arguments of a dataclass by name; a field that is a dataclass is a section.

    Args:
        target: the dataclass.
        default: supplies the classes of the sections; None: the types of the fields.
    """
    hints = typing.get_type_hints(target, include_extras=True)
    found = {}
    for field in dataclasses.fields(target):
        section = hints[field.name] if default is None else type(getattr(default, field.name))
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            for name, inner in arguments_of(section).items():
                found[f"{field.name}.{name}"] = dataclasses.replace(inner, name=f"{field.name}.{name}")
            continue
        kind, marks = _without_marks(hints[field.name])
        positional = tyro.conf.Positional in marks
        made = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        required = made is None and field.default is dataclasses.MISSING
        value = made if field.default is dataclasses.MISSING else field.default
        found[field.name] = Argument(field.name, kind, positional, value, required)
    return found


def parse_arguments(target: type[T], arguments: Sequence[str], source: str) -> T:
    """Parse arguments such as `--key value` into the dataclass `target`; the last value of a key wins.

    Args:
        target: the dataclass.
        arguments: the command-line arguments.
        source: origin of the arguments, for messages.

    Raises:
        InputError: an argument is unknown or missing, or a value does not fit its key.
    """
    known = arguments_of(target)
    given, problems = read_words(known, arguments)
    # A list of positional arguments may be empty; the command says what it wants there.
    given = {name: () for name, each in known.items() if each.positional and each.takes_many} | given
    required = {name for name, each in known.items() if each.required}
    missing = [each.option for each in known.values() if each.name in required and each.name not in given]
    if missing and not problems:
        problems.append(f"{' and '.join(missing)} must be given (see {source} --help)")
    made = None
    if not problems:
        made = build_from(given, lambda values: target(**values), problems, required)
    raise_all(problems, source)
    assert made is not None
    return made


def read_words(
    known: Mapping[str, Argument],
    words: Sequence[str],
    unknown: Callable[[str], str] = lambda option: f"unknown option {option}",
) -> tuple[dict[str, Any], list[str]]:
    """Return the values that the words of a command line give to arguments, and the problems.

    Args:
        known: the arguments by name.
        words: `--name value`, `--name=value`, `--name value value ...` for a list, and positional ones.
        unknown: returns the message for an option that is not known.
    """
    given: dict[str, list[str]] = {}
    problems: list[str] = []
    places = [each for each in known.values() if each.positional]
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--"):
            place = next((p for p in places if p.takes_many or p.name not in given), None)
            if place is None:
                problems.append(f"unexpected argument {word!r:.60} (an option begins with --)")
            else:
                given.setdefault(place.name, []).append(word)
            continue
        option, equals, value = word.partition("=")
        each = known.get(option[2:].replace("-", "_"))
        values = [value] if equals else []
        if each is None or each.positional:
            problems.append(unknown(option))
            while not equals and remaining and not remaining[0].startswith("--"):
                remaining.pop(0)  # its values
            continue
        while not equals and remaining and not remaining[0].startswith("--") and (each.takes_many or not values):
            values.append(remaining.pop(0))
        if values:
            given[each.name] = values
        else:
            problems.append(f"{option} needs a value")
    converted = {}
    for name, texts in given.items():
        try:
            converted[name] = known[name].from_text(texts)
        except ValueError as error:
            shown = name if "." in name else known[name].option
            problems.append(f"{shown}={' '.join(texts)!r:.60} must be {error}")
    return converted, problems


def build_from(
    given: Mapping[str, Any],
    build: Callable[[Mapping[str, Any]], T],
    problems: list[str],
    required: Collection[str] = (),
) -> T | None:
    """Build an object that checks itself, and add all that is wrong with the given values to `problems`.

    An object raises at its first fault. So the keys that the message names are left at their defaults, and the rest is
    tried again; a later fault counts only if it names none of the keys that were left out.

    Args:
        given: values by name, "section.field" or "field".
        build: makes the object, or raises InputError.
        problems: the list to extend.
        required: names without a default.

    Returns:
        The object; None if anything was wrong with it.
    """
    kept, left_out = dict(given), set[str]()
    found = False
    while True:
        try:
            made = build(kept)
            return None if found else made
        except InputError as error:
            message = str(error)
            if not set(re.findall(r"\w+", message)) & left_out:
                problems.append(message)
            found = True
            words = set(re.findall(r"(\w+) ?=", message))
            named = {name for name in kept if name.rpartition(".")[2] in words and name not in required}
            if not named:
                return None
            left_out |= {name.rpartition(".")[2] for name in named}
            for name in named:
                del kept[name]


def raise_all(problems: Sequence[str], source: str) -> None:
    """Raise InputError with all problems in one line, if there are any."""
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        raise InputError(f"{source}: {problems[0]}")
    if problems:
        numbered = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems, 1))
        raise InputError(f"{source}: {len(problems)} mistakes: {numbered}")


def print_arguments(target: type[T], program: str, default: T | None = None) -> None:
    """Print every option with its type, meaning and default.

    Args:
        target: the dataclass.
        program: name of the command.
        default: supplies the defaults, and the classes of the sections; None: the defaults of target.
    """
    with contextlib.suppress(SystemExit):
        keyword: dict[str, Any] = {} if default is None else {"default": default}
        tyro.cli(target, args=["--help"], prog=program, config=_CONFIG, **keyword)


def _without_marks(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type without the marks of Annotated, also on the alternatives of a union, and all its marks."""
    if typing.get_origin(kind) is typing.Annotated:
        inner, marks = _without_marks(typing.get_args(kind)[0])
        return inner, (*kind.__metadata__, *marks)
    return kind, ()


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union; text comes last, since any word is text."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return tuple(sorted(typing.get_args(kind) if union else (kind,), key=lambda each: each is str))


def _word_as(word: str, kind: Any) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        return _item_as(word, kind)
    if kind is bool:
        if word.lower() not in ("true", "false"):
            raise ValueError(word)
        return word.lower() == "true"
    if kind in (int, float, str, Path):
        return kind(word)
    raise ValueError(kind)


def _item_as(value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        if value in typing.get_args(kind):
            return value
    elif type(value) is kind:
        return value
    elif kind is float and type(value) is int and abs(value) < 1 << 1000:
        return float(value)
    elif kind is Path and type(value) is str:
        return Path(value)
    raise ValueError(value)


def _wanted(kinds: Sequence[Any]) -> str:
    """Return the text that completes "must be"."""
    texts = []
    for kind in sorted(kinds, key=lambda kind: typing.get_origin(kind) is tuple):
        if typing.get_origin(kind) is typing.Literal:
            texts.append(f"one of {', '.join(map(str, typing.get_args(kind)))}")
        elif typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            names = {int: "whole numbers", float: "numbers", str: "texts"}
            texts.append(f"a list of {names.get(item, 'paths')}")
        elif kind in _WANTED:
            texts.append(_WANTED[kind])
    return " or ".join(texts)


def fault_of_value(name: str, value: Any) -> str | None:
    """Return what is wrong with a value of the right type that no key allows, such as nan; None if nothing is."""
    for item in value if isinstance(value, tuple) else (value,):
        setting = f"{name}={item!r:.40}"
        if isinstance(item, float) and not math.isfinite(item):
            return f"{setting} must be a finite number"
        if isinstance(item, int) and abs(item) >= 1 << 63:
            return f"{setting} must be a number of 64 bits"
        if isinstance(item, str) and not item.isprintable():
            return f"{setting} must be text without control characters"
    return None

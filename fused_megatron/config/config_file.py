"""Reading and writing of config files: TOML with command-line overrides, and one clear line for every error."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fused_megatron.checks import InputError, check, check_one_of
from fused_megatron.config import MODEL_FAMILIES, TrainConfig, TransformerConfig
from fused_megatron.config.arguments import parse_arguments, print_arguments
from fused_megatron.untrusted_files import parse_toml

_MOST_BYTES = 1 << 20


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file, then apply overrides such as `--training.num_steps 10`; the last value of a key wins.

    Raises:
        InputError: the file is missing or no TOML, a key is unknown (the message names the nearest), a value does not
            fit its key.
    """
    arguments = [*_file_arguments(path), *overrides]
    _check_names(overrides)
    config = parse_arguments(TrainConfig, arguments, source=str(path), default=TrainConfig(_model_type(arguments)()))
    _check_values(config)
    return config


def print_help(program: str, arguments: Sequence[str] = ()) -> None:
    """Print every key with its type, meaning and default, for the model.family in the arguments."""
    print_arguments(TrainConfig, program, default=TrainConfig(_model_type(arguments)()))


def _model_type(arguments: Sequence[str]) -> type[TransformerConfig]:
    """Return the config class of the last model.family in the arguments; raise if a key belongs to another family."""
    family = "gpt"
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--model.family":
            family = value if equals else "".join(arguments[i + 1 : i + 2])
    check_one_of("model.family", family, list(MODEL_FAMILIES))
    found = MODEL_FAMILIES[family].config
    known = _known_keys(family)
    for argument in arguments:
        name = argument[2:].partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name in _known_keys() and name not in known:
            raise InputError(f"{name} is no key of model.family={family!r}")
    return found


def save_config(config: TrainConfig, path: Path) -> None:
    """Write config as TOML; load_config reads it back as an equal config."""
    path.write_text(config_text(config), encoding="utf-8")


def config_text(config: TrainConfig) -> str:
    """Return the config as TOML, without the fields that are None."""
    table = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in dataclasses.asdict(config).items()
    }
    return tomli_w.dumps(table)


def _file_arguments(path: Path) -> list[str]:
    """Return the file as command-line arguments, so that one parser gives both the same rules and messages."""
    try:
        with path.open("rb") as file:  # the path may be a pipe
            content = file.read(_MOST_BYTES + 1)
        check(len(content) <= _MOST_BYTES, f"config={path} must have {_MOST_BYTES} bytes at most: is it a config?")
    except FileNotFoundError:
        raise InputError(f"config={path} does not exist (a starting point: examples/gpt_tiny.toml)") from None
    except OSError as error:
        raise InputError(f"config={path} cannot be read: {error}") from None
    try:
        table = parse_toml(content)
    except InputError as error:
        raise InputError(f"config={path} is {error}") from None
    arguments = []
    known = _known_keys()
    for section, values in table.items():
        if not isinstance(values, dict):
            raise InputError(f"{path}: {section} must stand in a section{_nearest(section, known)}")
        for key, value in values.items():
            name = f"{section}.{key}"
            if name not in known:
                raise InputError(f"{path}: unknown key {name}{_nearest(name, known)}")
            if isinstance(value, list) and "tuple" in str(known[name]):
                # A string item would be a separate argument, and could be an option.
                if not all(type(item) is int for item in value):
                    raise InputError(f"{path}: {name} must be a list of whole numbers, not {value!r:.60}")
                arguments += [f"--{name}", *map(str, value)]
                continue
            if not isinstance(value, str | int | float):
                raise InputError(f"{path}: {name} must be one value (text, number, true or false), not {value!r:.60}")
            arguments.append(f"--{name}={value}")
    return arguments


def _check_names(arguments: Sequence[str]) -> None:
    known = _known_keys()
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            if name not in known:
                raise InputError(f"unknown option --{name}{_nearest(name, known)}")


def _check_values(config: TrainConfig) -> None:
    """Raise InputError for values of the right type that no key allows, such as nan."""
    for section in dataclasses.fields(config):
        for name, value in dataclasses.asdict(getattr(config, section.name)).items():
            for item in value if isinstance(value, tuple) else (value,):
                setting = f"{section.name}.{name}={item!r:.40}"
                if isinstance(item, float):
                    check(math.isfinite(item), f"{setting} must be a finite number")
                elif isinstance(item, int):
                    check(abs(item) < 1 << 63, f"{setting} must be a number of 64 bits")
                elif isinstance(item, str):
                    check(item.isprintable(), f"{setting} must be text without control characters")


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known key that was most likely meant, by the whole name or by the part after the section."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    if not close:
        by_field = {key.partition(".")[2]: key for key in known}
        close = [by_field[f] for f in difflib.get_close_matches(name.rpartition(".")[2], list(by_field), n=1)]
    return f" (did you mean {close[0]}?)" if close else " (all keys: fused-megatron train --help)"


def _known_keys(*families: str) -> dict[str, Any]:
    """Return every key and its type, for the given model families (default: all)."""
    sections = [("model", MODEL_FAMILIES[family].config) for family in families or MODEL_FAMILIES]
    sections += [item for item in typing.get_type_hints(TrainConfig).items() if item[0] != "model"]
    return {f"{section}.{f.name}": f.type for section, cls in sections for f in dataclasses.fields(cls)}


def with_run_folder(config: TrainConfig, path: Path) -> TrainConfig:
    """Return the config with a run folder: training.run_folder, by default runs/<name of the config file>."""
    if config.training.run_folder is not None:
        return config
    training = dataclasses.replace(config.training, run_folder=str(Path("runs") / path.stem))
    return dataclasses.replace(config, training=training)

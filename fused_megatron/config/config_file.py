"""From a TOML file and command-line overrides to a TrainConfig, with one clear line for every mistake."""

import dataclasses
import difflib
import math
import sys
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fused_megatron.checks import InputError, check, check_one_of
from fused_megatron.config import MODEL_FAMILIES, TrainConfig, TransformerConfig
from fused_megatron.config.arguments import parse_arguments, print_arguments

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MOST_BYTES = 1 << 20


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file, then apply overrides as `--training.num_steps 10` (the last one of a key wins).

    Raises:
        InputError: a file that is missing or no TOML, an unknown key (the nearest is named), a value that does not fit.
    """
    words = [*_file_arguments(path), *overrides]
    _check_names(overrides)
    config = parse_arguments(TrainConfig, words, source=str(path), default=TrainConfig(_model_type(words)()))
    _check_values(config)
    return config


def print_help(program: str, words: Sequence[str] = ()) -> None:
    """Print every key with its type, meaning and default; those of the model.family among the words."""
    print_arguments(TrainConfig, program, default=TrainConfig(_model_type(words)()))


def _model_type(words: Sequence[str]) -> type[TransformerConfig]:
    """What the keys of [model] are read as: the last model.family of the words decides."""
    family = "gpt"
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--model.family":
            family = value if equals else "".join(words[i + 1 : i + 2])
    check_one_of("model.family", family, list(MODEL_FAMILIES))
    found = MODEL_FAMILIES[family].config
    known = _known_keys(family)
    for word in words:
        name = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and name in _known_keys() and name not in known:
            raise InputError(f"{name} is no key of model.family={family!r}")
    return found


def save_config(config: TrainConfig, path: Path) -> None:
    """Write config as the TOML that load_config reads back to an equal one."""
    path.write_text(config_text(config), encoding="utf-8")


def config_text(config: TrainConfig) -> str:
    """The config as TOML (fields that are None are left out)."""
    table = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in dataclasses.asdict(config).items()
    }
    return tomli_w.dumps(table)


def _file_arguments(path: Path) -> list[str]:
    """The file as command-line words: one parser, and so one set of rules and messages, serves both."""
    try:
        with path.open("rb") as file:  # a pipe will do
            content = file.read(_MOST_BYTES + 1)
        check(len(content) <= _MOST_BYTES, f"config={path} must have {_MOST_BYTES} bytes at most: is it a config?")
        table = tomllib.loads(content.decode())
    except FileNotFoundError:
        raise InputError(f"config={path} does not exist (a starting point: examples/gpt_tiny.toml)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config={path} cannot be read: {error}") from None
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"config={path} is no TOML of a config: nested too deeply") from None
    except ValueError as error:  # a TOMLDecodeError, or a number of thousands of digits
        raise InputError(f"config={path} is no TOML: {error}") from None
    words = []
    known = _known_keys()
    for section, values in table.items():
        if not isinstance(values, dict):
            raise InputError(f"{path}: {section} must stand in a section{_nearest(section, known)}")
        for key, value in values.items():
            name = f"{section}.{key}"
            if name not in known:
                raise InputError(f"{path}: unknown key {name}{_nearest(name, known)}")
            if isinstance(value, list) and "tuple" in str(known[name]):
                # Text could be a word of its own, such as an option.
                if not all(type(item) is int for item in value):
                    raise InputError(f"{path}: {name} must be a list of whole numbers, not {value!r:.60}")
                words += [f"--{name}", *map(str, value)]
                continue
            if not isinstance(value, str | int | float):
                raise InputError(f"{path}: {name} must be one value (text, number, true or false), not {value!r:.60}")
            words.append(f"--{name}={value}")
    return words


def _check_names(words: Sequence[str]) -> None:
    known = _known_keys()
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            if name not in known:
                raise InputError(f"unknown option --{name}{_nearest(name, known)}")


def _check_values(config: TrainConfig) -> None:
    """Raise InputError for values that have the right type, and that nothing can be done with."""
    for section in dataclasses.fields(config):
        for name, value in dataclasses.asdict(getattr(config, section.name)).items():
            for one in value if isinstance(value, tuple) else (value,):
                where = f"{section.name}.{name}={one!r:.40}"
                if isinstance(one, float):
                    check(math.isfinite(one), f"{where} must be a finite number")
                elif isinstance(one, int):
                    check(abs(one) < 1 << 63, f"{where} must be a number of 64 bits")
                elif isinstance(one, str):
                    check(one.isprintable(), f"{where} must be text without control characters")


def _nearest(name: str, known: Iterable[str]) -> str:
    """The known key that was most likely meant: by the whole name, else by what follows the section."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    if not close:
        by_field = {key.partition(".")[2]: key for key in known}
        close = [by_field[f] for f in difflib.get_close_matches(name.rpartition(".")[2], list(by_field), n=1)]
    return f" (did you mean {close[0]}?)" if close else " (all keys: fused-megatron train --help)"


def _known_keys(*families: str) -> dict[str, Any]:
    """Every key and its type; of all families of models where none is given."""
    sections = [("model", MODEL_FAMILIES[family].config) for family in families or MODEL_FAMILIES]
    sections += [item for item in typing.get_type_hints(TrainConfig).items() if item[0] != "model"]
    return {f"{section}.{f.name}": f.type for section, cls in sections for f in dataclasses.fields(cls)}


def with_run_folder(config: TrainConfig, path: Path) -> TrainConfig:
    """The config with training.run_folder filled in: runs/<name of the config file>, where it is not given."""
    if config.training.run_folder is not None:
        return config
    training = dataclasses.replace(config.training, run_folder=str(Path("runs") / path.stem))
    return dataclasses.replace(config, training=training)

"""Reading and writing of config files: TOML with command-line overrides, and one clear line for every error."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w

from fused_megatron.checks import InputError, check, check_one_of
from fused_megatron.config import MODEL_FAMILIES, GPTConfig, TrainConfig, TransformerConfig
from fused_megatron.config.arguments import (
    Argument,
    arguments_of,
    build_from,
    fault_of_value,
    print_arguments,
    raise_all,
    read_words,
)
from fused_megatron.config.optimizer import KINDS
from fused_megatron.untrusted_files import parse_toml

_MOST_BYTES = 1 << 20
# Similarity above which another key is suggested: a letter or two are wrong.
_NEAR = 0.75
# Key of a section that chooses among kinds, and its values: what a user looks for who writes optimizer.name.
_CHOICES = {"optimizer": ("kind", KINDS), "model": ("family", tuple(MODEL_FAMILIES))}


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file, then apply overrides such as `--training.num-steps 10`; the last value of a key wins.

    Raises:
        InputError: the file is missing or no TOML, a key is unknown (the message names a near one), a value does not
            fit its key. The message names all mistakes at once.
    """
    return config_from(_read_table(path), overrides, str(path))


def config_from(table: Mapping[str, Any], overrides: Sequence[str], source: str) -> TrainConfig:
    """Return the config of a table of TOML and overrides.

    Args:
        table: the sections.
        overrides: options of a command line.
        source: name of the file, for messages.

    Raises:
        InputError: as load_config.
    """
    problems: list[str] = []
    model: type[TransformerConfig] = GPTConfig
    try:
        model = _model_type(table, overrides)
    except InputError as error:
        problems.append(str(error))
    default = TrainConfig(model())
    known = arguments_of(TrainConfig, default)
    given, of_file = _read_values(table, known)
    of_options, more = read_words(known, overrides, lambda option: _unknown("option", option, known))
    given |= of_options | {"model.family": default.model.family}
    problems += of_file + more
    for name, value in list(given.items()):
        problem = fault_of_value(name, value)
        if problem is not None:
            problems.append(problem)
            del given[name]

    def build(values: Mapping[str, Any]) -> TrainConfig:
        changed: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            section, _, key = name.partition(".")
            changed.setdefault(section, {})[key] = value
        # Every fault of one section is found before the faults between sections.
        sections = {section: replace(getattr(default, section), **keys) for section, keys in changed.items()}
        return replace(default, **sections)

    config = build_from(given, build, problems)
    raise_all(problems, source)
    assert config is not None
    return config


def print_help(program: str, arguments: Sequence[str] = ()) -> None:
    """Print every key with its type, meaning and default, for the model.family in the arguments."""
    print_arguments(TrainConfig, program, default=TrainConfig(_model_type({}, arguments)()))


def _model_type(table: Mapping[str, Any], overrides: Sequence[str] = ()) -> type[TransformerConfig]:
    """Return the config class of the last model.family."""
    model = table.get("model")
    family = model.get("family", "gpt") if isinstance(model, dict) else "gpt"
    for i, argument in enumerate(overrides):
        name, equals, value = argument.partition("=")
        if name == "--model.family":
            family = value if equals else "".join(overrides[i + 1 : i + 2])
    check_one_of("model.family", family, list(MODEL_FAMILIES))
    return MODEL_FAMILIES[family].config


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


def _read_table(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:  # the path may be a pipe
            content = file.read(_MOST_BYTES + 1)
        check(len(content) <= _MOST_BYTES, f"config={path} must have {_MOST_BYTES} bytes at most: is it a config?")
    except FileNotFoundError:
        raise InputError(f"config={path} does not exist (to write one: fused-megatron init {path})") from None
    except OSError as error:
        raise InputError(f"config={path} cannot be read: {error}") from None
    try:
        return parse_toml(content)
    except InputError as error:
        raise InputError(f"config={path} is {error}") from None


def _read_values(table: Mapping[str, Any], known: Mapping[str, Argument]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a file by name, and the problems."""
    given, problems = {}, []
    for section, values in table.items():
        if not isinstance(values, dict):
            problems.append(f"{section} must stand in a section{_nearest(section, known)}")
            continue
        for key, value in values.items():
            name = f"{section}.{key}"
            if name not in known:
                problems.append(_unknown("key", name, known))
                continue
            try:
                given[name] = known[name].from_toml(value)
            except ValueError as error:
                problems.append(f"{name}={value!r:.60} must be {error}")
    return given, problems


def _unknown(what: str, name: str, known: Mapping[str, Argument]) -> str:
    """Return the message for a key of a file ("key") or an option that is unknown."""
    key = name.removeprefix("--").replace("-", "_")
    for family, traits in MODEL_FAMILIES.items():
        if key in (f"model.{field.name}" for field in dataclasses.fields(traits.config)):
            return f"{key} is no key of model.family={known['model.family'].default!r} (it is one of {family!r})"
    return f"unknown {what} {name}{_nearest(key, known, '--' if what == 'option' else '')}"


def _nearest(name: str, known: Mapping[str, Argument], prefix: str = "") -> str:
    """Return a hint at the known key that was most likely meant.

    Its name after the section is nearly the same, or has all words of the given name, in the same section: steps for
    num_steps.
    """

    def likeness(key: str) -> tuple[float, ...]:
        (section, _, word), (given_section, _, given) = key.rpartition("."), name.rpartition(".")
        has_words = section == given_section and {*given.split("_")} <= {*word.split("_")}
        pairs = (word, given), (key, name)
        return has_words, *(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    nearest = max(known, key=likeness)
    has_words, ratio, _ = likeness(nearest)
    if has_words or ratio >= _NEAR:
        return f" (did you mean {known[nearest].option if prefix else nearest}?)"
    section = name.partition(".")[0]
    if section in _CHOICES:
        key, values = _CHOICES[section]
        return f" ({section}.{key} chooses: {', '.join(values)}; all keys: fused-megatron train --help)"
    return " (all keys: fused-megatron train --help)"


def with_run_folder(config: TrainConfig, path: Path) -> TrainConfig:
    """Return the config with a run folder: training.run_folder, by default runs/<name of the config file>."""
    if config.training.run_folder is not None:
        return config
    training = dataclasses.replace(config.training, run_folder=str(Path("runs") / path.stem))
    return dataclasses.replace(config, training=training)

"""The command `fused-megatron init`, which writes a config with every key, its meaning and its default."""

import ast
import inspect
import json
import os
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from fused_megatron.checks import InputError, check
from fused_megatron.config import TrainConfig
from fused_megatron.config.config_file import config_from
from fused_megatron.untrusted_files import parse_toml

_FOLDER = Path(__file__).parent / "starting_configs"
_LINE_CHARACTERS = 100


@dataclass(frozen=True)
class InitArguments:
    """Arguments of `fused-megatron init`."""

    config: tyro.conf.Positional[Path]
    """Config file to write; it must not exist."""
    like: Literal["gpt", "llama", "bert", "moe"] = "gpt"
    """Model to start from, small enough for a laptop: gpt, llama, bert, or moe (a GPT with experts)."""


def write_starting_config(arguments: InitArguments) -> list[str]:
    """Write the config; return lines that say what to do with it.

    Raises:
        InputError: the file exists or cannot be written, or its name does not end with .toml.
    """
    path = arguments.config
    check(path.suffix == ".toml", f"config={path} must end with .toml: {path.name}.toml")
    text = starting_config(arguments.like, str(path))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"config={path} exists: give another name, or remove it first") from None
    except OSError as error:
        raise InputError(f"config={path} cannot be written: {error.strerror or error}") from None
    return [
        f"{path}: {_title_of(arguments.like)}. It trains on the sources of Python's standard library; set data.path "
        f"for your own text.",
        f"  fused-megatron train {path}",
        f"  fused-megatron launch --nproc-per-node 2 train {path}   # two ranks",
    ]


def starting_config(like: str, name: str = "my.toml") -> str:
    """Return a config as TOML with comments: the keys of a small model first, then every other key at its default.

    Args:
        like: file in starting_configs, "gpt", "llama", "bert" or "moe".
        name: of the config file, for its first lines.
    """
    table = dict(_table_of(like))
    title = table.pop("title")
    config = config_from(table, (), like)
    lines = [
        f"# {title}. To train it:  fused-megatron train {name}",
        "# A key stands below its meaning. A line #KEY = VALUE holds the default of a key: remove the # to change it.",
        "# A key without a value is not set (None), with the effect that its meaning says.",
        "# All keys are also options:  fused-megatron train CONFIG --training.num-steps 1000",
    ]
    for field in fields(TrainConfig):
        section = getattr(config, field.name)
        lines += ["", "", f"[{field.name}]", *_section_lines(section, table.get(field.name, {}))]
    return "\n".join(lines) + "\n"


def _section_lines(section: Any, shown: dict[str, Any]) -> list[str]:
    meanings = field_docstrings(type(section))
    lines = []
    others = [field for field in fields(section) if field.name not in shown]
    for name in shown:
        lines += [*_comment(meanings[name]), f"{name} = {_toml_value(getattr(section, name))}", ""]
    if shown and others:
        lines += ["# Further keys, at their defaults.", ""]
    for field in others:
        value = getattr(section, field.name)
        # TOML has no None: the key without a value says that it is not set.
        lines += [*_comment(meanings[field.name]), f"#{field.name} = {_toml_value(value)}".rstrip(), ""]
    return lines[:-1]


def _comment(meaning: str) -> list[str]:
    return textwrap.wrap(meaning, _LINE_CHARACTERS, initial_indent="# ", subsequent_indent="# ")


def _toml_value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    # Text, true and false, and numbers have the same form in JSON; 1e-05 is a number of TOML too.
    return json.dumps(value, ensure_ascii=False)


def field_docstrings(config_class: type) -> dict[str, str]:
    """Return the text below each field of a config class, and of the classes that it extends, as one line."""
    found: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _table_of(like: str) -> dict[str, Any]:
    return parse_toml((_FOLDER / f"{like}.toml").read_bytes())


def _title_of(like: str) -> str:
    return os.fspath(_table_of(like)["title"])

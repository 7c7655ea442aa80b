"""Checks before a run that all ranks have the same settings, tokens and tokenizer."""

from collections.abc import Mapping
from typing import Any

from fused_megatron.checks import InputError


def check_same_config(ours: dict[str, Any], *others: dict[str, Any]) -> None:
    """Raise InputError for the first setting that another rank has with another value than rank 0."""
    for rank, other in enumerate(others, 1):
        for section, fields in ours.items():
            for name, value in fields.items():
                if other[section][name] != value:
                    raise InputError(
                        f"{section}.{name}={value!r} on rank 0 but {other[section][name]!r} on rank {rank}: "
                        f"start every rank with the same config"
                    )


def check_same_data(ours: Mapping[str, str], *others: Mapping[str, str]) -> None:
    """Raise InputError for the first rank whose tokens, tokenizer or vocabulary differ from rank 0's.

    Args:
        ours: `TrainingData.content` of rank 0.
        others: `TrainingData.content` of the other ranks.
    """
    for rank, other in enumerate(others, 1):
        for what in ("tokens", "tokenizer", "vocabulary"):
            if other.get(what) != ours.get(what):
                name = "tokenizer_path" if what == "tokenizer" else "tokens_path"
                first = "of the same path" if ours.get(name) == other.get(name) else ours.get(name)
                raise InputError(
                    f"the {what} of rank {rank} ({other.get(name)}) is not what rank 0 has ({first}): give every rank "
                    f"the same data.path, data.tokenizer_path and cache: one shared folder, or equal copies"
                )

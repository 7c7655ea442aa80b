"""Arguments and tables of the commands that plan: options of the command among overrides of the config."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from fused_megatron.checks import InputError, check, check_divisible
from fused_megatron.config import TrainConfig

_RECOMPUTATION = ("recompute", "recompute_blocks")


def split_options(
    words: Sequence[str], with_value: Collection[str], flags: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """Split arguments into a command's own options, by name, and all others in their order.

    Args:
        words: arguments such as "--ranks", "4", "--json", "--model.num_layers=2".
        with_value: options that take a value, as `--name value` or `--name=value`.
        flags: options without a value; their value in the result is "".

    Raises:
        InputError: an option lacks its value or is given twice, or a flag has a value.
    """
    found: dict[str, str] = {}
    others, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        check(name not in found, f"{name} must be given once, and is given twice: leave one out")
        if name in flags:
            check(not equals, f"{name}={value:.40} must be {name}: it takes no value")
            found[name] = ""
        elif name in with_value:
            if not equals and not rest:
                raise InputError(f"{name} needs a value")
            found[name] = value if equals else rest.pop(0)
        else:
            others.append(word)
    return found, others


def whole_number(name: str, text: str) -> int:
    """Return the number in the text; raise InputError unless it is a whole number of at most nine digits."""
    check(text.isascii() and text.isdigit() and len(text) < 10, f"{name}={text!r:.40} must be a whole number")
    return int(text)


def on_ranks(config: TrainConfig, world_size: int) -> TrainConfig:
    """Return the config with the data-parallel size that fits a number of ranks.

    Raises:
        InputError: world_size is 0, or the other axes do not divide it.
    """
    parallel = config.parallel
    model_ranks = dataclasses.replace(parallel, data_parallel_size=1).num_ranks
    names = "tensor_parallel_size x pipeline_parallel_size"
    names += " x context_parallel_size" if parallel.context_parallel_size > 1 else ""
    check(world_size > 0, f"ranks={world_size} must be 1 or more")
    check_divisible("ranks", world_size, names, model_ranks)
    parallel = dataclasses.replace(parallel, data_parallel_size=world_size // model_ranks)
    return dataclasses.replace(config, parallel=parallel)


def with_vocabulary(config: TrainConfig) -> TrainConfig:
    """Return the config with a vocabulary, for formulas: without one, the size that its tokenizer will have."""
    if config.model.vocab_size is not None:
        return config
    size = config.data.tokenizer_vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def vocabulary_note(config: TrainConfig) -> str:
    """Return what with_vocabulary chose, in words; empty if the config has a vocabulary."""
    if config.model.vocab_size is not None:
        return ""
    size = config.data.tokenizer_vocab_size
    return f"a vocabulary of {size:,} entries, as data.tokenizer_vocab_size (--model.vocab-size)"


def layout_words(config: TrainConfig, planned: TrainConfig) -> list[str]:
    """Return the options that turn a config into a plan of it: only the layout, microbatches and recomputation.

    The planner sets a vocabulary for its formulas; the run takes it from its tokenizer.
    """
    pairs: list[tuple[str, Any, Any]] = []
    for section in ("parallel", "training", "model"):
        own, other = getattr(config, section), getattr(planned, section)
        names = {
            "parallel": [field.name for field in dataclasses.fields(own)],
            "training": ["microbatch_size"],
            "model": list(_RECOMPUTATION),
        }[section]
        pairs += [(f"--{section}.{name.replace('_', '-')}", getattr(own, name), getattr(other, name)) for name in names]
    return [word for option, old, new in pairs if old != new for word in (option, _option_text(new))]


def _option_text(value: Any) -> str:
    """Return a value as the command line reads it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def text_table(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """Return the lines of a table with columns aligned to the right, but for those named in `left`."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

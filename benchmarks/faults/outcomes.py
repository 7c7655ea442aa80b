"""Outcomes of injected faults, and the text of their cells in the table."""

import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fused_megatron.testing.run_on_ranks import GRACE_S, RankError, run_on_ranks

MOST_CHARACTERS = 150
Outcome = Callable[[Path], str]
"""From an empty folder to what happened; it makes what it needs, and injects the fault."""

Answer = tuple[str, Any]
"""Answer of a rank: ("value", the loaded value) or ("error", its text)."""


class NotHere(Exception):
    """An injection that this machine cannot make; says what is missing."""


def on_ranks(function: Callable[..., Any], world_size: int, *args: Any, limit_s: float = 60.0) -> list[Any]:
    """By rank what function returned; ("died", code) for one that died, ("hangs", limit_s) for one that did not end."""
    try:
        return run_on_ranks(function, world_size, *args, timeout_s=limit_s)
    except RankError as error:
        found: dict[int, Answer] = {}
        # Where one has failed the others have less time.
        for rank, code in re.findall(r"rank (\d+) died with exit code (-?\d+)", str(error)):
            found[int(rank)] = "died", int(code)
        found |= {rank: seen(each) for rank, each in error.errors.items() if each is not None}
        found |= {rank: ("hangs", GRACE_S if found else limit_s) for rank in error.silent}
        # What the others returned is not known.
        return [found.get(rank, ("value", None)) for rank in range(world_size)]


class Seen(Exception):
    """What a rank has to tell where others of its call do not return."""

    def __init__(self, *answer: Any) -> None:
        super().__init__(*answer)


def seen(error: BaseException) -> Answer:
    return error.args if isinstance(error, Seen) else ("error", text_of(error))


def text_of(error: BaseException) -> str:
    """An error as its user reads it: its text, and its class where that is all."""
    return str(error).strip() or type(error).__name__


def error_words(text: str, folder: Path | None = None) -> str:
    """An error by how many lines it has; where there are several the last says most."""
    lines = [line for line in text.splitlines() if line.strip()] or [text]
    line = lines[-1].strip()
    if folder is not None:
        line = line.replace(f"{folder}{os.sep}", "")
    line = re.sub(r"/\S*/(?=[\w.-]+)", ".../", line).replace("`", "'").replace("|", "/")
    if len(line) > MOST_CHARACTERS:
        line = line[:MOST_CHARACTERS].rstrip() + " ..."
    return f"error: `{line}`" if len(lines) == 1 else f"error of {len(lines)} lines, the last: `{line}`"


def ending_words(answer: Answer) -> str:
    """How a rank ended that told nothing."""
    kind, value = answer
    if kind == "hangs":
        return f"**hangs** > {value:g} s"
    return f"**crash** ({signal.Signals(-value).name})" if value < 0 else f"ends with exit code {value}"


def loaded_words(answers: Sequence[Answer], folder: Path) -> str:
    """What all ranks loaded: step A (its tensors are 1), step B (2), a mix, other values; or why not."""
    for kind, value in answers:
        if kind in ("died", "hangs"):
            return ending_words((kind, value))
    errors = [text for kind, text in answers if kind == "error"]
    if errors:
        return error_words(errors[0], folder)
    if all(value == () for _, value in answers):
        return "finds no checkpoint: the run begins anew"
    steps = [{(1.0,): "A", (2.0,): "B"}.get(tuple(value), "damaged values") for _, value in answers]
    if len(set(steps)) > 1:
        each = ", ".join(f"rank {rank} has {f'step {s}' if len(s) == 1 else s}" for rank, s in enumerate(steps))
        return f"**silent mix**: {each}"
    return f"loads step {steps[0]}" if len(steps[0]) == 1 else f"**loads {steps[0]}, silently**"

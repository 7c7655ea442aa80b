"""The one line that a process says when it fails."""

import contextlib
import os
import sys
from typing import NoReturn


def say_error(message: str, rank: int | None = None) -> None:
    """Print the line to standard error; it names the rank, unless that is 0. None: the rank that a launcher gave."""
    named = os.environ.get("RANK", "0") if rank is None else str(rank)
    where = "" if named == "0" else f" (rank {named})"
    # Names in files of strangers may hold what a terminal obeys.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    with contextlib.suppress(OSError):  # a terminal that is gone
        # One write: the lines of ranks that end at once must not mix, where the output has no buffer either.
        sys.stderr.write(f"fused-megatron: error{where}: {line}\n")
        sys.stderr.flush()


def end_now(message: str, rank: int | None = None) -> NoReturn:
    """Say the line and end with code 1, without waiting for anything: the normal end would wait for a lost rank."""
    say_error(message, rank)
    os._exit(1)


def speaks_for_host() -> bool:
    """Whether this is the rank of its machine that says what all ranks have to say."""
    return os.environ.get("LOCAL_RANK", "0") == "0"

"""The error line that a failing process prints."""

import contextlib
import os
import sys
from typing import NoReturn


def print_error(message: str, rank: int | None = None) -> None:
    """Print the message to standard error as one line.

    Args:
        message: of the error.
        rank: named in the line unless it is 0; None: the rank that the launcher set.
    """
    named = os.environ.get("RANK", "0") if rank is None else str(rank)
    where = "" if named == "0" else f" (rank {named})"
    # Names from other people's files may hold control characters, which a terminal would obey.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    with contextlib.suppress(OSError):  # a terminal that is gone
        # One write, so that the lines of ranks that end together do not mix, even if the output has no buffer.
        sys.stderr.write(f"fused-megatron: error{where}: {line}\n")
        sys.stderr.flush()


def end_now(message: str, rank: int | None = None) -> NoReturn:
    """Print the error line and end with code 1 at once: the normal end of Python would wait for a lost rank."""
    print_error(message, rank)
    os._exit(1)


def prints_for_host() -> bool:
    """Return whether this rank prints the messages that all ranks of its machine share."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    return local_rank == "0" or not local_rank.isdecimal()  # a LOCAL_RANK that is no number is itself the error

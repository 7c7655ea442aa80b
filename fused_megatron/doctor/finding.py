"""A finding of the doctor: its level, its text, and the command that mends it."""

from dataclasses import dataclass

BROKEN, SLOW, NOTE = "broken", "slow", "note"


@dataclass(frozen=True)
class Finding:
    """A problem of this machine, or a note.

    Attributes:
        level: "broken": training fails, or does not run what is installed; "slow": training is slower than it could be;
            "note": may surprise.
        text: the problem and its effect.
        command: command that mends it; "" if there is nothing to do.
    """

    level: str
    text: str
    command: str = ""

"""Durations measured elsewhere, handed to a tool that insists on timing by itself (pytest-benchmark)."""

from collections.abc import Iterable


class RecordedDurations:
    """A clock that moves only when told to, by the next recorded duration."""

    def __init__(self) -> None:
        self._now = 0.0
        self._durations: list[float] = []

    def load(self, durations: Iterable[float]) -> None:
        """Record the durations that the next calls of advance() are to take."""
        self._durations = list(durations)

    def advance(self) -> None:
        """What is "timed": takes the next duration."""
        self._now += self._durations.pop(0)

    def clock(self) -> float:
        """Seconds so far: the timer to give to the tool."""
        return self._now

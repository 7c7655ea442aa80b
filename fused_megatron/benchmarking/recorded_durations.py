"""Clock that replays recorded durations, for a tool that must do the timing itself (pytest-benchmark)."""

from collections.abc import Iterable


class RecordedDurations:
    """Clock that moves only when advance() is called, by the next recorded duration."""

    def __init__(self) -> None:
        self._now = 0.0
        self._durations: list[float] = []

    def load(self, durations: Iterable[float]) -> None:
        """Set the durations for the next calls of advance()."""
        self._durations = list(durations)

    def advance(self) -> None:
        """Move the clock by the next duration; the tool times this function."""
        self._now += self._durations.pop(0)

    def clock(self) -> float:
        """Return the seconds so far; the tool uses this function as its timer."""
        return self._now

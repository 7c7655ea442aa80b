"""Clock that stands still while other processes hold the core of this thread."""

import threading
import time
from pathlib import Path


def core_wait_s() -> float:
    """Return the seconds in which this thread was ready to run and waited for a core; 0 where Linux does not say it."""
    try:
        words = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
    except OSError:
        return 0.0
    return int(words[1]) / 1e9


class CoreTime:
    """Time since it was made: `wall_s`, and `wait_s` in which this thread waited for a core."""

    def __init__(self) -> None:
        self._wait_s = core_wait_s()
        self._start = time.perf_counter()

    def stop(self) -> tuple[float, float]:
        """Return (wall_s, wait_s) until now."""
        wall_s = time.perf_counter() - self._start
        return wall_s, min(wall_s, max(0.0, core_wait_s() - self._wait_s))

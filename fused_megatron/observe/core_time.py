"""Clock that stands still while other processes hold the core of this thread."""

import statistics
import threading
import time
from collections.abc import Sequence
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


def quiet_median_s(samples: Sequence[tuple[float, float]]) -> float:
    """Return the median of wall_s - wait_s over the quieter half of the samples (wall_s, wait_s).

    A wait costs more than its seconds: other ranks wait for this one, and another process fills the caches. So the
    samples with the largest shares of waits are left out. On an idle machine the half is as good as the whole.
    """
    quieter = sorted(samples, key=lambda sample: sample[1] / (sample[0] or 1.0))[: (len(samples) + 1) // 2]
    return statistics.median(wall_s - wait_s for wall_s, wait_s in quieter)

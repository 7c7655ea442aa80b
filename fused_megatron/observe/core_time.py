"""Clock that stands still while other processes hold the core of this thread."""

import os
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path

_QUIET = 0.02
"""Share of waits that disturbs no measurement."""


def core_wait_s() -> float:
    """Return the seconds in which this thread was ready to run and waited for a core; 0 where Linux does not say it."""
    try:
        words = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
    except OSError:
        return 0.0
    return int(words[1]) / 1e9


def cores_busy_s() -> float:
    """Return the seconds for which the cores of this process worked, for any process and all cores together.

    In steps of a hundredth; 0 where Linux does not say it.
    """
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return 0.0
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    # user, nice, system, idle, iowait, irq, softirq, steal
    rows = [[int(word) for word in words[1:9]] for words in map(str.split, lines) if words and words[0] in mine]
    return sum(sum(row) - row[3] - row[4] for row in rows) / os.sysconf("SC_CLK_TCK")


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
    """Return the median of wall_s - wait_s over the quiet samples (wall_s, wait_s), at least over their quieter half.

    A wait costs more than its seconds: other ranks wait for this one, and another process fills the caches. So of the
    samples with waits of more than 2 % those with the largest shares are left out, at most half of all.
    """
    sorted_ = sorted(samples, key=_wait_share)
    limit = max(_QUIET, _wait_share(sorted_[(len(samples) - 1) // 2]))
    return statistics.median(wall_s - wait_s for wall_s, wait_s in samples if _wait_share((wall_s, wait_s)) <= limit)


def _wait_share(sample: tuple[float, float]) -> float:
    wall_s, wait_s = sample
    return wait_s / (wall_s or 1.0)

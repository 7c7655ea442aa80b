"""Speed of this thread's core: work of neighbours on the same host slows it by a fifth for seconds or minutes."""

import time

import torch

_SIZE, _REPEATS = 512, 8


class CoreSpeed:
    """A fixed piece of work, to be timed beside a measurement: times of both grow alike where the core is slow.

    Waits for a core do not count: the time is the thread's own.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._a, self._b = (torch.randn(_SIZE, _SIZE, generator=generator) for _ in range(2))
        self._out = torch.empty(_SIZE, _SIZE)
        self.probe_s()

    def probe_s(self) -> float:
        """Return the seconds of the core that the work takes now, about 15 ms."""
        begin = time.thread_time()
        for _ in range(_REPEATS):
            torch.mm(self._a, self._b, out=self._out)
        return time.thread_time() - begin

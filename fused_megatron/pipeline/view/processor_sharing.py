"""Times of the actions of ranks that share cores: those that run get equal parts of the cores (processor sharing)."""

from collections import deque
from collections.abc import Iterable
from heapq import heappop, heappush
from typing import NamedTuple


class Task(NamedTuple):
    """An action of a rank.

    Attributes:
        rank: runs its tasks one after the other, in their order.
        work: time of the action with a core of its own.
        source: index of the task whose end is waited for; -1: none.
        channel: channel through which its result comes; -1: none.
        earliest: time before which it does not start.
    """

    rank: int
    work: float
    source: int = -1
    channel: int = -1
    earliest: float = 0.0


def times_on_cores(
    tasks: Iterable[Task], cores: float, link_latency: float = 0.0, link_occupied: float = 0.0
) -> tuple[list[float], list[float]]:
    """Return start and end of each task, where a waiting rank leaves its core to the others.

    Args:
        tasks: each after all that it waits for.
        cores: ranks that run at full speed at once. Of more running ranks each gets cores / number.
        link_latency, link_occupied: as in Costs.
    """
    return _Sharing(list(tasks), cores, link_latency, link_occupied).run()


class _Sharing:
    def __init__(self, tasks: list[Task], cores: float, latency: float, occupied: float) -> None:
        self.tasks, self.cores, self.latency, self.occupied = tasks, cores, latency, occupied
        self.starts, self.ends = [0.0] * len(tasks), [-1.0] * len(tasks)
        self.queues: dict[int, deque[int]] = {}
        for index, task in enumerate(tasks):
            self.queues.setdefault(task.rank, deque()).append(index)
        self.free: dict[int, float] = {}  # time from which a channel takes the next message
        self.left: dict[int, float] = {}  # work of each running rank
        self.timers: list[tuple[float, int]] = []  # ranks that start at a known time
        self.blocked: dict[int, list[int]] = {}  # ranks that wait for a task
        self.now = 0.0

    def run(self) -> tuple[list[float], list[float]]:
        for rank in self.queues:
            self._arm(rank)
        while self.left or self.timers:
            rate = min(1.0, self.cores / (len(self.left) or 1))
            soonest = min(self.left, key=lambda rank: self.left[rank]) if self.left else -1
            end = self.now + self.left[soonest] / rate if self.left else float("inf")
            time = min(end, self.timers[0][0]) if self.timers else end
            for rank in self.left:
                self.left[rank] -= rate * (time - self.now)
            self.now = time
            if self.timers and self.timers[0][0] <= time:
                self._start(heappop(self.timers)[1])
            else:
                self._finish(soonest)
        return self.starts, self.ends

    def _arm(self, rank: int) -> None:
        """Let a rank wait for the next of its tasks."""
        if not self.queues[rank]:
            return
        task = self.tasks[self.queues[rank][0]]
        if task.source >= 0 and self.ends[task.source] < 0:
            self.blocked.setdefault(task.source, []).append(rank)
            return
        arrived = self.ends[task.source] if task.source >= 0 else 0.0
        if task.channel >= 0:
            left = max(arrived, self.free.get(task.channel, 0.0)) + self.occupied
            self.free[task.channel] = left
            arrived = left + self.latency
        heappush(self.timers, (max(self.now, arrived, task.earliest), rank))

    def _start(self, rank: int) -> None:
        index = self.queues[rank][0]
        self.starts[index] = self.now
        self.left[rank] = self.tasks[index].work

    def _finish(self, rank: int) -> None:
        index = self.queues[rank].popleft()
        del self.left[rank]
        self.ends[index] = self.now
        self._arm(rank)
        for other in self.blocked.pop(index, ()):
            self._arm(other)

"""Simulation of a schedule: start and end of each action, from the costs of each kind."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from fused_megatron.checks import check
from fused_megatron.pipeline.schedule.action import COMPUTE, Action, Kind, Schedule, peak_live_activations


@dataclass(frozen=True)
class Costs:
    """Times of actions, in any unit.

    Attributes:
        forward, input_grad, weight_grad: time for one microbatch: one number for all stages, or one for each stage. B
            takes input_grad + weight_grad.
        reduce_grad, reduce_tied, update: time of one action (only lowered schedules have reductions).
        link_latency: time from the end of a send to its arrival on another rank; it blocks nothing.
        link_occupied: time for which a message blocks its channel (ranks, direction) for the next message.
    """

    forward: float | tuple[float, ...] = 1.0
    input_grad: float | tuple[float, ...] = 1.0
    weight_grad: float | tuple[float, ...] = 1.0
    reduce_grad: float = 0.0
    reduce_tied: float = 0.0
    update: float = 0.0
    link_latency: float = 0.0
    link_occupied: float = 0.0

    def per_stage(self, num_stages: int) -> dict[Kind, tuple[float, ...]]:
        """Return the times of each kind, one for each stage.

        Raises:
            InputError: a time is negative, or there is not one time for each stage.
        """
        times = {}
        for kind in (Kind.FORWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD):
            name = kind.name.lower()
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,) * num_stages
            check(
                len(values) == num_stages,
                f"{name}: {len(values)} times given, one for each of {num_stages} stages wanted",
            )
            times[kind] = values
        times[Kind.BACKWARD] = tuple(
            i + w for i, w in zip(times[Kind.INPUT_GRAD], times[Kind.WEIGHT_GRAD], strict=True)
        )
        for kind in (Kind.REDUCE_GRAD, Kind.REDUCE_TIED, Kind.UPDATE):
            times[kind] = (getattr(self, kind.name.lower()),) * num_stages
        lowest = min(min(values) for values in (*times.values(), (self.link_latency, self.link_occupied)))
        check(lowest >= 0, f"costs: {lowest} must be 0 or more")
        return times


class Event(NamedTuple):
    """An action with its times."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Actions of each rank with their times. Sends and receives take no time of a rank, and are not included.

    Attributes:
        name: name of the schedule.
        events: the events of each rank, in order.
        peak_live: for each rank the most forward activations alive at once, each of one stage and one microbatch.
        stuck: (rank, position) of every rank that waits forever; empty unless the schedule deadlocks.
        makespan: end of the last action.
        busy: for each rank the time in actions.
    """

    name: str
    events: tuple[tuple[Event, ...], ...]
    peak_live: tuple[int, ...] = ()
    stuck: tuple[tuple[int, int], ...] = field(default=())

    @property
    def makespan(self) -> float:
        return max((events[-1].end for events in self.events if events), default=0.0)

    @property
    def busy(self) -> list[float]:
        return [sum(event.end - event.start for event in events) for events in self.events]

    @property
    def bubble(self) -> float:
        """Makespan minus the time in actions of the busiest rank."""
        return self.makespan - max(self.busy, default=0.0)

    @property
    def idle_inside(self) -> list[float]:
        """For each rank the idle time between its first and its last action."""
        return [
            events[-1].end - events[0].start - busy if events else 0.0
            for events, busy in zip(self.events, self.busy, strict=True)
        ]


# Condition that an action waits for, and that the end of an action fulfils: (stage, F or I or W, microbatch); for a
# tied group (rank that has arrived, REDUCE_TIED, group).
_Key = tuple[int, Kind, int | None]


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Simulate a schedule: each rank runs its actions in order, each as soon as its inputs have arrived.

    The timeline of a schedule that deadlocks ends early, and has `stuck` set (`schedule_findings` gives the reason).

    Raises:
        InputError: costs that do not fit the schedule.
    """
    return _Simulation(schedule, costs or Costs()).run()


class _Simulation:
    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule, self.costs = schedule, costs
        self.times = costs.per_stage(schedule.num_stages)
        self.done: dict[_Key, tuple[float, int]] = {}
        self.waiting: defaultdict[_Key, list[int]] = defaultdict(list)
        self.channel_free: defaultdict[tuple[int, int, str], float] = defaultdict(float)
        self.clock = [0.0] * schedule.num_ranks
        self.position = [0] * schedule.num_ranks
        self.events: list[list[Event]] = [[] for _ in range(schedule.num_ranks)]

    def run(self) -> Timeline:
        ready = list(range(self.schedule.num_ranks))
        while ready:
            self._advance(ready.pop(), ready)
        lists = self.schedule.actions
        stuck = [(rank, p) for rank, p in enumerate(self.position) if p < len(lists[rank])]
        events = tuple(tuple(events) for events in self.events)
        return Timeline(self.schedule.name, events, tuple(peak_live_activations(self.schedule)), tuple(stuck))

    def _advance(self, rank: int, ready: list[int]) -> None:
        """Run the actions of a rank until it must wait."""
        actions, done, events, times = self.schedule.actions[rank], self.done, self.events[rank], self.times
        while self.position[rank] < len(actions):
            action = actions[self.position[rank]]
            if action.kind in times:
                tied = action.kind == Kind.REDUCE_TIED
                needs = self._tied_needs(action, rank, ready) if tied else self._needs(action)
                for key in needs:
                    if key not in done:
                        self.waiting[key].append(rank)
                        return
                start = self.clock[rank]
                for key in needs:
                    start = max(start, self._arrival(key, rank))
                end = start + times[action.kind][action.stage]
                events.append(Event(action, start, end))
                self.clock[rank] = end
                for key in self._gives(action):
                    done[key] = (end, rank)
                    if key in self.waiting:
                        ready.extend(self.waiting.pop(key))
            self.position[rank] += 1

    def _needs(self, action: Action) -> tuple[_Key, ...]:
        stage, kind, microbatch = action
        if kind == Kind.FORWARD:
            return ((stage - 1, Kind.FORWARD, microbatch),) if stage else ()
        if kind in (Kind.BACKWARD, Kind.INPUT_GRAD):
            own = (stage, Kind.FORWARD, microbatch)
            return (own,) if stage == self.schedule.num_stages - 1 else (own, (stage + 1, Kind.INPUT_GRAD, microbatch))
        return ((stage, Kind.INPUT_GRAD, microbatch),) if kind == Kind.WEIGHT_GRAD else ()

    def _tied_needs(self, action: Action, rank: int, ready: list[int]) -> tuple[_Key, ...]:
        """Record that the rank has arrived at a tied reduction, and return the arrivals of all its ranks."""
        index = action.tied_group
        own = (rank, Kind.REDUCE_TIED, index)
        if own not in self.done:
            self.done[own] = (self.clock[rank], rank)
            ready.extend(self.waiting.pop(own, ()))
        owners = sorted({self.schedule.placement[stage] for stage in self.schedule.tied[index]})
        return tuple((owner, Kind.REDUCE_TIED, index) for owner in owners)

    def _gives(self, action: Action) -> tuple[_Key, ...]:
        stage, kind, microbatch = action
        if kind == Kind.BACKWARD:
            return ((stage, Kind.INPUT_GRAD, microbatch), (stage, Kind.WEIGHT_GRAD, microbatch))
        return ((stage, kind, microbatch),) if kind in COMPUTE else ()

    def _arrival(self, key: _Key, rank: int) -> float:
        """Return the arrival time of a result. Each key has one reader on another rank, in the order of the sends."""
        end, source = self.done[key]
        if source == rank or key[1] == Kind.REDUCE_TIED:
            return end
        channel = (source, rank, key[1])
        self.channel_free[channel] = left = max(end, self.channel_free[channel]) + self.costs.link_occupied
        return left + self.costs.link_latency

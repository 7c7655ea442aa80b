"""Simulation of a schedule: start and end of each action, from the costs of each kind."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from fused_megatron.checks import check
from fused_megatron.pipeline.schedule.action import COMPUTE, Action, Kind, Schedule, peak_live_activations
from fused_megatron.pipeline.view.processor_sharing import Task, times_on_cores


@dataclass(frozen=True)
class Costs:
    """Times of actions, in any unit.

    Attributes:
        forward, input_grad, weight_grad: time for one microbatch: one number for all stages, or one for each stage. B
            takes input_grad + weight_grad.
        reduce_grad, reduce_tied, update: time of one action (only lowered schedules have reductions).
        link_latency: time from the end of a send to its arrival on another rank; it blocks nothing.
        link_occupied: time for which a message blocks its channel (ranks, direction) for the next message.
        cores: ranks that compute at full speed at once; more of them share the cores (processor_sharing.py).
    """

    forward: float | tuple[float, ...] = 1.0
    input_grad: float | tuple[float, ...] = 1.0
    weight_grad: float | tuple[float, ...] = 1.0
    reduce_grad: float = 0.0
    reduce_tied: float = 0.0
    update: float = 0.0
    link_latency: float = 0.0
    link_occupied: float = 0.0
    cores: float = math.inf

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
        check(self.cores > 0, f"cores={self.cores} must be above 0")
        return times


def mean_costs(actions: Iterable[tuple[int, str, float]], num_stages: int) -> Costs:
    """Return the mean times of recorded actions as costs; messages take no time.

    Args:
        actions: stage, kind ("F", "B", "I" or "W") and time of each action.
        num_stages: stages of the pipeline. A stage without actions of a kind has the time 0. The time of whole
            backwards counts as the time of input gradients.
    """
    times: dict[tuple[int, str], list[float]] = {}
    for stage, kind, taken in actions:
        times.setdefault((stage, kind), []).append(taken)

    def mean(kinds: str) -> tuple[float, ...]:
        rows = [next((times[stage, k] for k in kinds if (stage, k) in times), [0.0]) for stage in range(num_stages)]
        return tuple(sum(row) / len(row) for row in rows)

    return Costs(mean("F"), mean("IB"), mean("W"))


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

_KINDS = (*COMPUTE, Kind.REDUCE_GRAD, Kind.REDUCE_TIED, Kind.UPDATE)
"""Kinds of actions that take time."""
_NOTHING = -1


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Simulate a schedule: each rank runs its actions in order, each as soon as its inputs have arrived.

    The timeline of a schedule that deadlocks ends early, and has `stuck` set (`schedule_findings` gives the reason).

    Raises:
        InputError: costs that do not fit the schedule.
    """
    order = order_of(schedule)
    starts, ends = order.times(costs or Costs())
    events: list[list[Event]] = [[] for _ in range(schedule.num_ranks)]
    for rank, position, start, end in zip(order.ranks, order.positions, starts, ends, strict=True):
        if position != _NOTHING:
            events[rank].append(Event(schedule.actions[rank][position], start, end))
    peak_live = tuple(peak_live_activations(schedule))
    return Timeline(schedule.name, tuple(tuple(each) for each in events), peak_live, order.stuck)


@dataclass(frozen=True)
class Order:
    """Actions of a schedule in an order in which each comes after all that it waits for.

    The order does not depend on the costs, so a search plays one order with many of them. A rank runs its actions one
    after the other; so it waits only for results of other ranks. An action that waits for several has entries without a
    position and without a cost before it.

    Attributes:
        num_ranks, num_stages, num_channels: of the schedule. A channel carries one kind of message between two ranks.
        ranks, positions: rank of each entry, and its position in the rank's list.
        costs: kind and stage of each entry: index of the kind in _KINDS x num_stages + stage.
        inputs: the entry whose end is waited for; -1: none.
        channels: channel through which this input comes; -1: none.
        stuck: (rank, position) of every rank that waits forever.
    """

    num_ranks: int
    num_stages: int
    num_channels: int
    ranks: array[int]
    positions: array[int]
    costs: array[int]
    inputs: array[int]
    channels: array[int]
    stuck: tuple[tuple[int, int], ...]

    def times(self, costs: Costs) -> tuple[list[float], list[float]]:
        """Return start and end of each entry.

        Raises:
            InputError: costs that do not fit the schedule.
        """
        by_kind = costs.per_stage(self.num_stages)
        values = [*(value for kind in _KINDS for value in by_kind[kind]), 0.0]
        latency, occupied = costs.link_latency, costs.link_occupied
        clock, free = [0.0] * self.num_ranks, [0.0] * self.num_channels
        starts, ends = list[float](), list[float]()
        entries = zip(self.ranks, self.costs, self.inputs, self.channels, strict=True)
        if costs.cores < self.num_ranks:
            tasks = (Task(rank, values[cost], source, channel) for rank, cost, source, channel in entries)
            return times_on_cores(tasks, costs.cores, latency, occupied)
        for rank, cost, source, channel in entries:
            start = clock[rank]
            if source >= 0:
                arrived = ends[source]
                if channel >= 0:
                    left = max(arrived, free[channel]) + occupied
                    free[channel] = left
                    arrived = left + latency
                if arrived > start:
                    start = arrived
            end = clock[rank] = start + values[cost]
            starts.append(start)
            ends.append(end)
        return starts, ends


def order_of(schedule: Schedule) -> Order:
    """Find an order of a schedule's actions; those behind a deadlock are left out."""
    return _Ordering(schedule).run()


class _Ordering:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.done: dict[_Key, int] = {}
        self.waiting: defaultdict[_Key, list[int]] = defaultdict(list)
        self.channels: dict[tuple[int, int, bool], int] = {}
        self.position = [0] * schedule.num_ranks
        self.ranks, self.positions, self.costs, self.inputs, self.of_channel = (array("i") for _ in range(5))

    def run(self) -> Order:
        ready = list(range(self.schedule.num_ranks))
        while ready:
            self._advance(ready.pop(), ready)
        lists, num_stages = self.schedule.actions, self.schedule.num_stages
        stuck = tuple((rank, p) for rank, p in enumerate(self.position) if p < len(lists[rank]))
        arrays = (self.ranks, self.positions, self.costs, self.inputs, self.of_channel)
        return Order(self.schedule.num_ranks, num_stages, len(self.channels), *arrays, stuck)

    def _advance(self, rank: int, ready: list[int]) -> None:
        """Order the actions of a rank until it must wait."""
        actions, num_stages, done = self.schedule.actions[rank], self.schedule.num_stages, self.done
        while self.position[rank] < len(actions):
            action = actions[self.position[rank]]
            if action.kind in _INDEX:
                tied = action.kind == Kind.REDUCE_TIED
                needs = self._tied_needs(action, rank, ready) if tied else self._needs(action)
                for key in needs:
                    if key not in done:
                        self.waiting[key].append(rank)
                        return
                others = [done[key] for key in needs if self.ranks[done[key]] != rank]
                for source in others[1:]:
                    self._entry(rank, _NOTHING, _NOTHING, source, action.kind)
                cost = _INDEX[action.kind] * num_stages + action.stage
                self._entry(rank, self.position[rank], cost, others[0] if others else _NOTHING, action.kind)
                for key in self._gives(action):
                    done[key] = len(self.ranks) - 1
                    if key in self.waiting:
                        ready.extend(self.waiting.pop(key))
            self.position[rank] += 1

    def _entry(self, rank: int, position: int, cost: int, source: int, kind: Kind) -> None:
        channel = _NOTHING
        if source != _NOTHING and kind != Kind.REDUCE_TIED:
            # Each result has one reader on another rank, in the order of the sends.
            ends = (self.ranks[source], rank, kind == Kind.FORWARD)
            channel = self.channels.setdefault(ends, len(self.channels))
        self.ranks.append(rank)
        self.positions.append(position)
        self.costs.append(cost)
        self.inputs.append(source)
        self.of_channel.append(channel)

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
            self._entry(rank, _NOTHING, _NOTHING, _NOTHING, action.kind)
            self.done[own] = len(self.ranks) - 1
            ready.extend(self.waiting.pop(own, ()))
        owners = sorted({self.schedule.placement[stage] for stage in self.schedule.tied[index]})
        return tuple((owner, Kind.REDUCE_TIED, index) for owner in owners)

    def _gives(self, action: Action) -> tuple[_Key, ...]:
        stage, kind, microbatch = action
        if kind == Kind.BACKWARD:
            return ((stage, Kind.INPUT_GRAD, microbatch), (stage, Kind.WEIGHT_GRAD, microbatch))
        return ((stage, kind, microbatch),) if kind in COMPUTE else ()


_INDEX = {kind: index for index, kind in enumerate(_KINDS)}

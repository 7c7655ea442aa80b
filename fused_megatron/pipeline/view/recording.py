"""Recording of the actions and times of a real pipeline, as a timeline like the simulator's."""

import platform
import time

import torch.distributed as dist

from fused_megatron.collectives.groups import Group, group_size
from fused_megatron.collectives.together import gather_json
from fused_megatron.pipeline.schedule.action import COMPUTE, Action, Kind, live_activations
from fused_megatron.pipeline.view.simulation import Event, Timeline

_TIMED = (*COMPUTE, Kind.REDUCE_GRAD, Kind.REDUCE_TIED, Kind.UPDATE)


class Recorder:
    """Recorder of the actions of a step.

        recorder = Recorder(mesh.pp_group)
        executor = PipelineExecutor(schedule, ..., observe=recorder)
        recorder.begin()
        executor.step(...)
        measured = recorder.timeline("1f1b")
        both = {"predicted": simulate(schedule, costs_in_seconds), "measured": measured}
        if rank == 0:
            Path("step.json").write_text(to_perfetto(both, microseconds_per_unit=1e6))

    The times are measured in Python: on a GPU they are the times at which work was queued. The ranks of one machine
    share a clock; a barrier synchronises the clocks of several machines.

    Args:
        pp_group: the ranks of the pipeline; None for one rank.
    """

    def __init__(self, pp_group: Group) -> None:
        self._group = pp_group
        self._events: list[Event] = []
        self._zero = time.perf_counter()

    def __call__(self, action: Action, start: float, end: float) -> None:
        """Record an action; the executor's `observe`. Sends and receives are ignored, as in a predicted timeline."""
        if action.kind in _TIMED:
            self._events.append(Event(action, start - self._zero, end - self._zero))

    def begin(self) -> None:
        """Delete the recorded actions, and set time 0 to now. All ranks must call.

        Communication: one barrier.
        """
        self._events.clear()
        if group_size(self._group) > 1:
            dist.barrier(self._group)
        self._zero = time.perf_counter()

    def timeline(self, name: str) -> Timeline:
        """Return the recorded timeline of all ranks since `begin`, on all ranks; times in seconds.

        Communication: two all-gathers.
        """
        own = [[*event.action, event.start, event.end] for event in self._events]
        machines, zeros, rows = zip(*gather_json([platform.node(), self._zero, own], self._group), strict=True)
        # Ranks leave a barrier milliseconds apart. The first rank of each machine defines the machine's time 0.
        first = {m: min(z for z, machine in zip(zeros, machines, strict=True) if machine == m) for m in machines}
        late = [zero - first[machine] for zero, machine in zip(zeros, machines, strict=True)]
        events = tuple(
            tuple(
                Event(Action(stage, Kind(kind), index), start + by, end + by) for stage, kind, index, start, end in row
            )
            for row, by in zip(rows, late, strict=True)
        )
        peak = tuple(max(live_activations(event.action for event in row), default=0) for row in events)
        return Timeline(name, events, peak)

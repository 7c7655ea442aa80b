"""What a pipeline really did and when, in the form that the simulator predicts it in."""

import time

import torch.distributed as dist

from fused_megatron.collectives.gather_json import gather_json
from fused_megatron.collectives.groups import Group, group_size
from fused_megatron.pipeline.schedule import COMPUTE, REDUCE_GRAD, REDUCE_TIED, UPDATE, Action, live_activations
from fused_megatron.pipeline.simulation import Event, Timeline

_TIMED = (*COMPUTE, REDUCE_GRAD, REDUCE_TIED, UPDATE)


class Recorder:
    """Records the actions of a step.

        recorder = Recorder(mesh.pp_group)
        executor = PipelineExecutor(schedule, ..., observe=recorder)
        recorder.begin()
        executor.step(...)
        measured = recorder.timeline("1f1b")
        if rank == 0:
            Path("step.json").write_text(to_perfetto({"predicted": simulate(schedule, costs), "measured": measured}))

    The time of an action is that of this rank's Python: on a GPU it says when the work was queued.

    Args:
        pp_group: the ranks of the pipeline; None for one rank.
    """

    def __init__(self, pp_group: Group) -> None:
        self._group = pp_group
        self._events: list[Event] = []
        self._zero = time.perf_counter()

    def __call__(self, action: Action, start: float, end: float) -> None:
        """As the executor's `observe`. Sends and receives are left out, as in a predicted timeline."""
        if action.kind in _TIMED:
            self._events.append(Event(action, start - self._zero, end - self._zero))

    def begin(self) -> None:
        """Forget what was recorded; time 0 is now. On all ranks.

        Communication: one barrier, by which clocks of different machines are set alike.
        """
        self._events.clear()
        if group_size(self._group) > 1:
            dist.barrier(self._group)
        self._zero = time.perf_counter()

    def timeline(self, name: str) -> Timeline:
        """What was recorded since `begin`, of all ranks, on all ranks; times in seconds.

        Communication: two all-gathers.
        """
        own = [[*event.action, event.start, event.end] for event in self._events]
        rows = gather_json(own, self._group)
        events = tuple(
            tuple(Event(Action(stage, kind, m), start, end) for stage, kind, m, start, end in row) for row in rows
        )
        peak = tuple(max(live_activations(event.action for event in row), default=0) for row in events)
        return Timeline(name, events, peak)

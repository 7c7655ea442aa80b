"""Start here when a recorded timeline differs from the actions of the pipeline."""

import pytest
import torch
from torch import nn

from fused_megatron.pipeline import Action, build_schedule, lower
from fused_megatron.pipeline.run.executor import PipelineExecutor
from fused_megatron.pipeline.schedule.action import COMPUTE, Kind
from fused_megatron.pipeline.view.recording import Recorder


def test_one_rank_records_what_it_does_in_order():
    schedule = build_schedule("zb_h1", 1, 3)
    recorder = Recorder(None)
    executor = PipelineExecutor(
        schedule, {0: nn.Linear(2, 1)}, pp_group=None, loss_fn=lambda y, t: (y - t).sum(), observe=recorder
    )
    data = [torch.zeros(4, 2)] * 3, [torch.zeros(4, 1)] * 3
    executor.step(*data, loss_divisor=12)
    recorder.begin()  # forgets the step before
    executor.step(*data, loss_divisor=12)
    timeline = recorder.timeline("mine")
    (events,) = timeline.events
    timed = (*COMPUTE, Kind.REDUCE_GRAD)
    assert [event.action for event in events] == [a for a in lower(schedule).actions[0] if a.kind in timed]
    assert 0 <= events[0].start <= events[0].end <= events[1].start
    assert (timeline.name, timeline.peak_live) == ("mine", (1,))


@pytest.mark.parametrize("kind", [Kind.SEND_F, Kind.RECV_B])
def test_messages_are_left_out(kind):
    recorder = Recorder(None)
    recorder(Action(0, kind, 0), 0.0, 1.0)
    assert recorder.timeline("").events == ((),)

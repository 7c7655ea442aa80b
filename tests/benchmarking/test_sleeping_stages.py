"""Start here when `make bench-pipeline` measures another bubble or memory than the simulator predicts."""

import dataclasses
import json
from itertools import pairwise

import pytest
import torch.distributed as dist

from fused_megatron.benchmarking.sleeping_stages import MeasuredSchedule, measure_schedule, message_seconds
from fused_megatron.pipeline import Costs, build_schedule, simulate
from fused_megatron.pipeline.schedule.action import COMPUTE, Kind
from fused_megatron.pipeline.view.timeline import to_perfetto
from fused_megatron.testing import run_on_ranks

RANKS = 4
CASES = [("1f1b", 5, 1), ("interleaved_zero_bubble", 5, 1), ("zb_v", 4, 1), ("pipedream_2bw", 4, 2)]


def costs_of(schedule):
    share = schedule.num_stages // RANKS
    return Costs(0.010 / share, 0.013 / share, 0.007 / share)


def measure(rank, world_size, schedules):
    return [measure_schedule(schedule, costs_of(schedule), dist.group.WORLD) for schedule in schedules]


def test_a_step_takes_the_time_and_the_memory_that_were_predicted():
    schedules = [build_schedule(name, RANKS, m, num_steps=steps) for name, m, steps in CASES]
    answers = run_on_ranks(measure, RANKS, schedules)
    for index, schedule in enumerate(schedules):
        result = answers[0][index]
        assert all(answer[index] == result for answer in answers), "every rank knows all of it"
        # Only the benchmark checks how much longer a step takes: at most 5 %.
        assert result.predicted.makespan <= max(result.step_s)
        assert result.exposed_messages(schedule) < 1
        assert tuple(result.peak_held) == result.predicted.peak_live == result.measured.peak_live
        for rank, events in enumerate(result.measured.events):
            done = [event.action for event in events if event.action.kind in (*COMPUTE, Kind.UPDATE)]
            assert done == list(schedule.actions[rank])
            assert all(a.start <= a.end <= b.start for a, b in pairwise(events))
            # No step can take less time than its stages sleep.
            assert result.measured.busy[rank] >= 0.999 * result.predicted.busy[rank]
    trace = json.loads(to_perfetto({"predicted": result.predicted, "measured": result.measured}))
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert names == ["predicted", "measured"]


@pytest.mark.parametrize("name", ["1f1b", "zb_v", "interleaved_1f1b"])
def test_exposed_messages_are_the_delay_of_a_step(name):
    """A recorded step whose messages take time is longer by that than the same actions with messages of no time."""
    schedule = build_schedule(name, RANKS, 8)
    plain = costs_of(schedule)
    late = dataclasses.replace(plain, link_latency=0.004)
    measured, without = simulate(schedule, late), simulate(schedule, plain)
    result = MeasuredSchedule(without, measured, [measured.makespan], [])
    assert result.exposed_messages(schedule) == pytest.approx(1 - without.makespan / measured.makespan)
    assert result.exposed_messages(schedule) > 0.01
    result = MeasuredSchedule(without, without, [without.makespan], [])
    assert result.exposed_messages(schedule) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
def test_the_least_messages_are_the_delay_by_messages_of_a_known_time(name):
    schedule = build_schedule(name, RANKS, 8)
    plain = costs_of(schedule)
    without, late = (simulate(schedule, dataclasses.replace(plain, link_latency=s)) for s in (0.0, 0.004))
    result = MeasuredSchedule(without, without, [without.makespan], [])
    assert result.least_messages(schedule, 0.004) == pytest.approx(1 - without.makespan / late.makespan)
    assert result.least_messages(schedule, 0.0) == 0


def measure_message(rank, world_size):
    return message_seconds(0.001, dist.group.WORLD, messages=3)


def test_the_time_of_a_message_is_the_same_on_every_rank():
    times = run_on_ranks(measure_message, RANKS)
    assert times == [times[0]] * RANKS
    assert 0 < times[0] < 60

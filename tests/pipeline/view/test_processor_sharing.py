"""Start here when the timeline of ranks that share cores is wrong."""

import math

import pytest

from fused_megatron.checks import InputError
from fused_megatron.pipeline.schedule.schedules import build_schedule
from fused_megatron.pipeline.view.processor_sharing import Task, times_on_cores
from fused_megatron.pipeline.view.simulation import Costs, simulate


def test_running_ranks_get_equal_parts_of_the_cores() -> None:
    # Three ranks on two cores: the short task ends first, and leaves its part to the others.
    starts, ends = times_on_cores([Task(0, 2.0), Task(1, 5.0), Task(2, 5.0)], 2)
    assert starts == [0, 0, 0]
    assert ends == pytest.approx([3, 6, 6])  # two thirds of a core each until 3, then a core each for 3 more


def test_a_waiting_rank_leaves_its_core_to_others() -> None:
    # Rank 1 waits for rank 0, then for the message; meanwhile rank 2 has the only core with rank 0, then alone.
    tasks = [Task(0, 1.0), Task(1, 1.0, source=0, channel=0), Task(2, 2.0)]
    starts, ends = times_on_cores(tasks, 1, link_latency=0.5, link_occupied=0.25)
    assert ends[0] == pytest.approx(2.0)  # half of the core
    assert starts[1] == pytest.approx(2.75)
    assert ends[2] == pytest.approx(2.75 + 2 * 0.25)  # alone until 2.75, then half of the core
    assert ends[1] == pytest.approx(4.0)


def test_tasks_of_one_rank_follow_each_other_and_wait_for_their_time() -> None:
    starts, ends = times_on_cores([Task(0, 1.0), Task(0, 1.0, earliest=3.0), Task(1, 0.0)], 1)
    assert (starts, ends) == ([0, 3, 0], [1, 4, 0])


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v"])
def test_as_many_cores_as_ranks_change_nothing(name: str) -> None:
    schedule = build_schedule(name, 4, 8)
    stages = schedule.num_stages
    forward = tuple(1.0 + 0.1 * stage for stage in range(stages))
    free = Costs(forward, forward, forward, link_latency=0.2, link_occupied=0.1)
    alone = simulate(schedule, free)
    # With a hair less than four cores the other simulation runs, and must find the same times.
    shared = simulate(schedule, Costs(forward, forward, forward, 0, 0, 0, 0.2, 0.1, cores=4 - 1e-9))
    for one, other in zip(alone.events, shared.events, strict=True):
        for before, after in zip(one, other, strict=True):
            assert before.action == after.action
            assert (after.start, after.end) == pytest.approx((before.start, before.end), rel=1e-6)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1"])
@pytest.mark.parametrize("cores", [1, 2, 3])
def test_a_pipeline_takes_at_least_its_work_over_the_cores(name: str, cores: int) -> None:
    schedule = build_schedule(name, 4, 8)
    free, shared = (simulate(schedule, Costs(cores=number)) for number in (math.inf, cores))
    work = 4 * 8 * 3.0
    assert shared.makespan >= max(free.makespan, work / cores) * (1 - 1e-12)
    if cores == 1:
        assert shared.makespan == pytest.approx(work)  # some rank always has work


def test_no_cores_are_one_line() -> None:
    with pytest.raises(InputError, match="cores=0 must be above 0"):
        simulate(build_schedule("1f1b", 2, 2), Costs(cores=0))

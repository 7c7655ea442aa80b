"""Start here when a memory formula misses the moment of a schedule at which a rank holds most."""

import pytest

from fused_megatron.assembly.pipeline_plan import PipelinePlan, plan_pipeline
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig
from fused_megatron.pipeline.schedule.action import ENDS_OF_BACKWARD, Kind, stages_of
from fused_megatron.planning import schedule_moments
from fused_megatron.planning.schedule_moments import needs_no_more_than_the_rank_before, rank_moments

SCHEDULES = {"1f1b": 1, "interleaved_1f1b": 2, "zb_h1": 1, "zb_v": 2, "dual_pipe_v": 2, "gpipe": 1}


def plan_of(name: str, num_ranks: int = 4) -> PipelinePlan:
    parallel = ParallelConfig(
        pipeline_parallel_size=num_ranks,
        schedule=name,
        stages_per_rank=SCHEDULES[name] if SCHEDULES[name] > 1 else None,
    )
    return plan_pipeline(TrainConfig(GPTConfig(num_layers=16, vocab_size=100), parallel))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_microbatches", [8, 12, 45, 64])
def test_the_most_held_microbatches_are_of_the_whole_schedule(name: str, num_microbatches: int) -> None:
    plan = plan_of(name)
    schedule = plan.schedule(num_microbatches)
    for rank in range(4):
        stages = stages_of(plan.placement, rank)
        held = dict.fromkeys(stages, 0)
        most = 0
        for action in schedule.actions[rank]:
            held[action.stage] += action.kind == Kind.FORWARD
            most = max(most, sum(held.values()))
            held[action.stage] -= action.kind in ENDS_OF_BACKWARD
        moments = rank_moments(plan, num_microbatches, rank)
        assert most == 1 + max(sum(moment.held) + sum(moment.deferred) for moment in moments)
        assert {moment.stage for moment in moments if moment.last} == set(range(len(stages)))


@pytest.mark.parametrize("name", ["1f1b", "interleaved_1f1b", "zb_h1", "zb_v"])
def test_fewer_microbatches_have_the_moments_of_all(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plans = [plan_of(name, ranks) for ranks in (2, 4)]
    fewer = [rank_moments(plan, 52, rank) for plan in plans for rank in range(2)]
    monkeypatch.setattr(schedule_moments, "_fewer", lambda plan, number: number)
    assert fewer == [rank_moments(plan, 52, rank) for plan in plans for rank in range(2)]


def test_later_ranks_of_1f1b_hold_no_more() -> None:
    plan = plan_of("1f1b")
    assert [needs_no_more_than_the_rank_before(plan, 16, rank) for rank in range(4)] == [False, True, True, True]
    first, last = rank_moments(plan, 16, 0), rank_moments(plan, 16, 3)
    assert max(moment.held for moment in first) == (3,) and max(moment.held for moment in last) == (0,)

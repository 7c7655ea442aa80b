"""Start here when a long step takes another time than its full simulation."""

import random

import pytest

from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig
from fused_megatron.pipeline.view.simulation import Costs, simulate
from fused_megatron.planning.prediction import played_schedule
from fused_megatron.planning.prediction.played_schedule import play

CASES = [("1f1b", 1, 4), ("1f1b", 1, 7), ("interleaved_1f1b", 2, 4), ("zb_h1", 1, 4), ("zb_v", 2, 4), ("gpipe", 1, 3)]


@pytest.mark.parametrize(("name", "per_rank", "ranks"), CASES)
@pytest.mark.parametrize(("spread", "tolerance"), [(0.0, 1e-12), (0.3, 0.02)])
def test_a_continued_step_takes_the_time_of_the_whole_simulation(monkeypatch, name, per_rank, ranks, spread, tolerance):
    monkeypatch.setattr(played_schedule, "_ACTIONS_IN_FULL", 0)
    draw = random.Random(3)
    parallel = ParallelConfig(pipeline_parallel_size=ranks, stages_per_rank=per_rank, schedule=name)
    plan = plan_pipeline(TrainConfig(model=GPTConfig(num_layers=32, vocab_size=64), parallel=parallel))
    forward, inputs, weights = (
        tuple(base * draw.uniform(1, 1 + spread) for _ in range(plan.num_stages)) for base in (1.0, 1.1, 0.8)
    )
    costs = Costs(forward, inputs, weights, link_latency=0.05)
    for number in (121, 144):
        whole = simulate(plan.schedule(number), costs)
        played = play(plan, costs, number)
        assert len(played.timeline.events[0]) < len(whole.events[0])
        assert played.busy == pytest.approx(whole.busy, rel=1e-12)
        assert played.ends == pytest.approx([events[-1].end for events in whole.events], rel=tolerance)


def test_short_steps_are_simulated_in_full():
    plan = plan_pipeline(TrainConfig(model=GPTConfig(vocab_size=64), parallel=ParallelConfig(pipeline_parallel_size=2)))
    played = play(plan, Costs(), 8)
    assert len(played.timeline.events[0]) == 16
    assert played.makespan == 8 * 3 + 3

"""A pipeline schedule with its times: simulated in full, or for some microbatches and continued to all of them."""

from dataclasses import dataclass
from functools import lru_cache

from fused_megatron.assembly.pipeline_plan import PipelinePlan
from fused_megatron.pipeline.schedule.action import Kind
from fused_megatron.pipeline.schedule.schedules import build_schedule
from fused_megatron.pipeline.view.simulation import Costs, Order, Timeline, order_of, simulate

_ACTIONS_IN_FULL = 4000
_WHOLE = (Kind.FORWARD, Kind.BACKWARD)
_ROUNDS, _MICROBATCHES = 4, 24
"""Least size of the simulated part of a long step: in rounds of one microbatch for each rank, and in microbatches."""


@dataclass(frozen=True)
class PlayedSchedule:
    """Times of a schedule, in seconds.

    Attributes:
        plan, costs: the schedule and the times of its actions.
        num_simulated: number of simulated microbatches; of a long step only the first and the last ones.
        ends: end of each rank's last action.
        busy: time of each rank in actions.
    """

    plan: PipelinePlan
    costs: Costs
    num_simulated: int
    ends: tuple[float, ...]
    busy: tuple[float, ...]

    @property
    def makespan(self) -> float:
        return max(self.ends)

    @property
    def timeline(self) -> Timeline:
        """The simulated actions. They are simulated again: a search keeps many results, and draws none."""
        return simulate(self.plan.schedule(self.num_simulated), self.costs)


def play(plan: PipelinePlan, costs: Costs, num_microbatches: int) -> PlayedSchedule:
    """Simulate the schedule of a step.

    In the middle of a long step all ranks repeat the same actions: with as many microbatches more as there are ranks,
    the step grows by the same time. So a long step is simulated with two numbers of microbatches, and continued. The
    result is exact for equal stages, and within 2 % for stages whose times differ by up to 30 %.
    """
    ranks = max(plan.placement) + 1
    few = max(_ROUNDS, -(-_MICROBATCHES // ranks)) * ranks + num_microbatches % ranks
    if num_microbatches <= 2 * few + ranks or 2 * plan.num_stages * num_microbatches <= _ACTIONS_IN_FULL:
        return _simulated(plan, costs, num_microbatches)
    before, after = _simulated(plan, costs, few), _simulated(plan, costs, few + ranks)
    rounds = (num_microbatches - few - ranks) // ranks

    def continued(first: tuple[float, ...], second: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(s + rounds * (s - f) for f, s in zip(first, second, strict=True))

    return PlayedSchedule(
        plan, costs, few + ranks, continued(before.ends, after.ends), continued(before.busy, after.busy)
    )


def _simulated(plan: PipelinePlan, costs: Costs, num_microbatches: int) -> PlayedSchedule:
    num_ranks = max(plan.placement) + 1
    order = _order(plan.name, num_ranks, plan.num_stages // num_ranks, num_microbatches)
    _, ends = order.times(costs)
    last = dict(zip(order.ranks, ends, strict=True))
    total = [sum(times) for times in zip(*(costs.per_stage(plan.num_stages)[kind] for kind in _WHOLE), strict=True)]
    busy = [0.0] * num_ranks
    for stage, rank in enumerate(plan.placement):
        busy[rank] += num_microbatches * total[stage]
    return PlayedSchedule(plan, costs, num_microbatches, tuple(last[rank] for rank in range(num_ranks)), tuple(busy))


@lru_cache(maxsize=64)
def _order(name: str, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Order:
    """Return the order of a schedule's actions; a search plays one schedule with many costs."""
    return order_of(build_schedule(name, num_ranks, num_microbatches, stages_per_rank))

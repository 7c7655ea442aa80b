"""Pipeline stages that sleep instead of computing, to measure schedules of many ranks on few cores."""

import dataclasses
import time
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.pipeline import Costs, Schedule, Timeline, simulate
from fused_megatron.pipeline.run.executor import PipelineExecutor
from fused_megatron.pipeline.run.stage_hooks import StageFunctions
from fused_megatron.pipeline.schedule.action import Kind, stages_of
from fused_megatron.pipeline.view.recording import Recorder
from fused_megatron.pipeline.view.simulation import mean_costs
from fused_megatron.sharding import parameter_record

# Size of a message between stages, small enough to be sent at once.
_MESSAGE_ELEMENTS = 1024


@dataclass
class HeldActivations:
    """Number of activations (of one stage and microbatch) that a rank holds now, and at its peak."""

    now: int = 0
    peak: int = 0

    def hold(self) -> object:
        """Return an object that counts as an activation until it is freed."""
        kept = _Activation()
        self.now += 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(kept, self._release)
        return kept

    def _release(self) -> None:
        self.now -= 1


class _Activation:
    """Stand-in for the tensors that a layer keeps for its backward."""


class SleepingStage(nn.Module):
    """Identity that takes a given time; its weight gradient can be deferred, as in our linear layers.

    Args:
        forward_s, input_grad_s, weight_grad_s: seconds that each part takes.
        held: counts the activations that are kept from the forward to the end of the backward.
    """

    def __init__(self, forward_s: float, input_grad_s: float, weight_grad_s: float, held: HeldActivations) -> None:
        super().__init__()
        self.seconds = (forward_s, input_grad_s, weight_grad_s)
        self.held = held
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Sleep.apply(x, self.weight, self)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, stage: SleepingStage) -> torch.Tensor:
        time.sleep(stage.seconds[0])
        ctx.seconds, ctx.kept = stage.seconds, stage.held.hold()
        ctx.deferred = parameter_record(weight).deferred
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, input_grad_s, weight_grad_s = ctx.seconds
        kept, ctx.kept = ctx.kept, None
        time.sleep(input_grad_s)
        if ctx.deferred is not None and ctx.deferred.open:
            ctx.deferred.append(lambda: _sleep_with(weight_grad_s, kept))
        else:
            _sleep_with(weight_grad_s, kept)
        return dy[0].clone(), None, None


def _sleep_with(seconds: float, kept: object) -> None:
    time.sleep(seconds)


@dataclass(frozen=True)
class MeasuredSchedule:
    """Measurement and prediction of one schedule.

    Attributes:
        predicted, measured: timelines, in seconds.
        step_s: seconds of executor.step() on the slowest rank, for each step.
        peak_held: for each rank, the largest number of activations at one time.
    """

    predicted: Timeline
    measured: Timeline
    step_s: list[float]
    peak_held: list[int]

    def exposed_messages(self, schedule: Schedule) -> float:
        """Return the share of the measured step by which messages delay it.

        It is the excess over the same actions, with their measured times and messages that take no time.
        """
        return 1 - simulate(schedule, self._costs(schedule)).makespan / self.measured.makespan

    def least_messages(self, schedule: Schedule, message_s: float) -> float:
        """Return the share by which messages of message_s seconds would delay a step of these actions."""
        costs = self._costs(schedule)
        late = dataclasses.replace(costs, link_latency=message_s)
        return 1 - simulate(schedule, costs).makespan / simulate(schedule, late).makespan

    def _costs(self, schedule: Schedule) -> Costs:
        """Return the measured mean times of the actions; messages take no time."""
        actions = [(*event.action[:2], event.end - event.start) for events in self.measured.events for event in events]
        return mean_costs(actions, schedule.num_stages)


def message_seconds(rest_s: float, group: dist.ProcessGroup, *, messages: int = 20) -> float:
    """Return the median seconds from a send of rank 0 to the end of rank 1's wait, by the group's own send and receive.

    The ranks of one machine share the clock. All ranks of the group must call this.

    Args:
        rest_s: seconds that rank 0 sleeps before each message, so that both ranks wake up for it as in a pipeline.
        group: at least two ranks.
        messages: number of messages, after one that warms up.

    Communication: a message of 4 KiB each way for each of `messages`, and one all-reduce.
    """
    rank, tensor, clock = dist.get_rank(group), torch.zeros(_MESSAGE_ELEMENTS), torch.zeros(1, dtype=torch.float64)
    taken = torch.zeros(messages + 1, dtype=torch.float64)
    for index in range(messages + 1):
        if rank == 0:
            time.sleep(rest_s)
            clock[0] = time.perf_counter()
            dist.send(tensor, group=group, group_dst=1)
            dist.send(clock, group=group, group_dst=1)
            dist.recv(tensor, group=group, group_src=1)
        elif rank == 1:
            dist.recv(tensor, group=group, group_src=0)
            end = time.perf_counter()
            dist.recv(clock, group=group, group_src=0)
            taken[index] = end - clock.item()
            dist.send(tensor, group=group, group_dst=0)
    dist.all_reduce(taken, group=group)
    return taken[1:].median().item()


def measure_schedule(
    schedule: Schedule, costs: Costs, pp_group: dist.ProcessGroup, *, steps: int = 1
) -> MeasuredSchedule:
    """Run a schedule with stages that take the given times, and simulate it. All ranks of pp_group must call this.

    Args:
        schedule: compute actions.
        costs: of the stages, in seconds of sleep; costs of links are used only for the simulation.
        pp_group: has as many ranks as the schedule.
        steps: number of measured steps, after one warm-up step. The measured timeline is of the fastest step.
    """
    rank, held = dist.get_rank(pp_group), HeldActivations()
    times = costs.per_stage(schedule.num_stages)
    stages = {
        stage: SleepingStage(
            times[Kind.FORWARD][stage], times[Kind.INPUT_GRAD][stage], times[Kind.WEIGHT_GRAD][stage], held
        )
        for stage in stages_of(schedule.placement, rank)
    }
    recorder = Recorder(pp_group)
    executor = PipelineExecutor(
        schedule,
        stages,
        pp_group=pp_group,
        loss_fn=lambda y, target: (y - target).sum(),
        hooks=StageFunctions(update=lambda stage, index: None),
        observe=recorder,
    )
    data = [torch.zeros(_MESSAGE_ELEMENTS, requires_grad=True) for _ in schedule.microbatches]
    timelines, seconds = [], []
    for _ in range(steps + 1):
        recorder.begin()
        start = time.perf_counter()
        executor.step(data, data, loss_divisor=1.0)
        slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=pp_group)
        seconds.append(slowest.item())
        timelines.append(recorder.timeline(schedule.name))
    executor.close()
    peaks = torch.zeros(schedule.num_ranks, dtype=torch.int64)
    peaks[rank] = held.peak
    dist.all_reduce(peaks, group=pp_group)
    best = min(range(1, steps + 1), key=lambda index: seconds[index])
    return MeasuredSchedule(simulate(schedule, costs), timelines[best], seconds[1:], peaks.tolist())

"""Start here when a part of a step is too long or too short."""

import threading
import time

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.collectives.together import sum_over_ranks_
from fused_megatron.collectives.transfers import start_all_reduce_
from fused_megatron.observe.step_breakdown import StepBreakdown
from fused_megatron.observe.waits import BUBBLE, COMMUNICATION, wait_for
from fused_megatron.pipeline import PipelineExecutor, build_schedule
from fused_megatron.testing import run_on_ranks

LATE_S = 0.2


def late_rank(rank: int, world_size: int) -> dict[str, float]:
    """Rank 1 computes longer before an all-reduce, an asynchronous all-reduce, and an all-reduce in backward."""
    group, x = dist.group.WORLD, torch.ones(8)
    start_all_reduce_(x, group).wait()  # the first collective sets up the transport
    breakdown = StepBreakdown(torch.device("cpu"))
    with breakdown.record():
        start = time.perf_counter()
        time.sleep(LATE_S * rank)
        sum_over_ranks_(x, group)
        time.sleep(LATE_S * rank)
        start_all_reduce_(x, group).wait()
        loss = _SumOfGradients.apply(torch.ones(2, requires_grad=True))
        time.sleep(LATE_S * rank)
        loss.sum().backward()
        seconds = time.perf_counter() - start
    sum_over_ranks_(x, group)  # outside of record(): not measured
    return breakdown.parts(seconds)


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return start_all_reduce_(dy.clone(), dist.group.WORLD).wait()


def test_the_wait_for_a_late_rank_is_communication() -> None:
    early, late = run_on_ranks(late_rank, 2)
    assert set(early) == set(late) == {"compute", "communication"}
    # On a busy machine the late rank waits, too, but less.
    assert early["communication"] > max(LATE_S, late["communication"])
    assert late["compute"] >= 3 * LATE_S


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(LATE_S)
        return self.linear(x)


def stages(rank: int, world_size: int) -> dict[str, float]:
    """Each stage waits for the other stage's forward, or sleeps during its own."""
    stage = Slow()
    executor = PipelineExecutor(
        build_schedule("1f1b", 2, 1), {rank: stage}, pp_group=dist.group.WORLD, loss_fn=lambda y, _: y.sum()
    )
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    breakdown, x = StepBreakdown(torch.device("cpu")), [torch.ones(1, 4)]
    dist.barrier()
    with breakdown.record():
        start = time.perf_counter()
        executor.step(x, x, loss_divisor=1.0)
        optimizer.step()
        seconds = time.perf_counter() - start
    executor.close()
    return breakdown.parts(seconds)


def test_the_wait_of_a_stage_for_its_neighbour_is_bubble() -> None:
    for parts in run_on_ranks(stages, 2):
        assert {"compute", "bubble", "optimizer"} <= set(parts)
        # On a busy machine the neighbour may be some way into its sleep before this stage begins to wait.
        assert parts["bubble"] > 0.2 * LATE_S and parts["compute"] > 0.8 * LATE_S


def test_a_wait_inside_another_counts_once_and_other_threads_do_not() -> None:
    def take() -> str:
        time.sleep(0.05)
        wait_for(COMMUNICATION, lambda: time.sleep(0.05))
        return "taken"

    breakdown = StepBreakdown(torch.device("cpu"))
    with breakdown.record():
        assert wait_for(BUBBLE, take) == "taken"
        thread = threading.Thread(target=wait_for, args=(COMMUNICATION, lambda: time.sleep(0.05)))
        thread.start()
        thread.join()
    parts = breakdown.parts(1.0)
    assert set(parts) == {"compute", "bubble"} and parts["bubble"] >= 0.1
    assert abs(sum(parts.values()) - 1.0) < 1e-9
    wait_for(COMMUNICATION, lambda: None)  # no observer
    assert breakdown.parts(1.0) == parts
    with breakdown.record():
        wait_for(COMMUNICATION, lambda: time.sleep(0.05))
    assert breakdown.parts(0.01)["compute"] == 0.0 and "bubble" not in breakdown.parts(0.01)


def test_a_wait_that_fails_ends_too() -> None:
    breakdown = StepBreakdown(torch.device("cpu"))
    with breakdown.record():
        try:
            wait_for(COMMUNICATION, lambda: 1 // 0)
        except ZeroDivisionError:
            wait_for(COMMUNICATION, lambda: time.sleep(0.05))
    assert breakdown.parts(1.0)["communication"] >= 0.05

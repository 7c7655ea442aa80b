"""Start here when the parts of a step (compute, communication, bubble) do not add up."""

import threading
import time

import torch
import torch.distributed as dist

from fused_megatron.benchmarking.step_breakdown import StepBreakdown
from fused_megatron.pipeline.run.messages import Messages
from fused_megatron.testing import run_on_ranks

LATE_S = 0.2


def late_rank(rank: int, world_size: int) -> dict[str, float]:
    """Rank 1 computes for longer, once in front of an all-reduce and once in front of an asynchronous one."""
    breakdown = StepBreakdown(torch.device("cpu"))
    x = torch.ones(8)
    dist.barrier()
    with breakdown.record():
        start = time.perf_counter()
        for asynchronous in (False, True):
            time.sleep(LATE_S * rank)
            work = dist.all_reduce(x, async_op=asynchronous)
            if work is not None:
                work.wait()
        seconds = time.perf_counter() - start
    dist.barrier()  # outside: not counted
    return breakdown.parts(seconds)


def test_the_wait_for_a_late_rank_is_communication() -> None:
    early, late = run_on_ranks(late_rank, 2)
    assert set(early) == set(late) == {"compute", "communication"}
    assert early["communication"] > 1.8 * LATE_S and early["compute"] < LATE_S
    assert late["communication"] < early["communication"] and late["compute"] >= 2 * LATE_S


def test_a_wait_inside_another_counts_once_and_other_threads_do_not(monkeypatch) -> None:
    class Work:
        def wait(self) -> None:
            time.sleep(0.05)

    def take(_: object) -> None:
        time.sleep(0.05)
        Work().wait()

    monkeypatch.setattr(dist, "Work", Work)
    monkeypatch.setattr("fused_megatron.benchmarking.step_breakdown._SEAMS", (("communication", Work, "wait"),))
    monkeypatch.setattr(Messages, "take", take)
    breakdown = StepBreakdown(torch.device("cpu"), pipeline=True)
    with breakdown.record():
        Messages.take(None)  # type: ignore[arg-type]
        thread = threading.Thread(target=Work().wait)
        thread.start()
        thread.join()
    parts = breakdown.parts(1.0)
    assert set(parts) == {"compute", "bubble"} and parts["bubble"] >= 0.1
    assert abs(sum(parts.values()) - 1.0) < 1e-9
    assert Messages.take is take  # as it was
    with breakdown.record():
        Work().wait()
    assert breakdown.parts(0.01)["compute"] == 0.0 and "bubble" not in breakdown.parts(0.01)

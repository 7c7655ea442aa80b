"""Measurements of one rank in a training step: bytes held, bytes sent, products, and the time of few ranks."""

import os
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.benchmarking.sleeping_stages import measure_schedule
from fused_megatron.config import TrainConfig
from fused_megatron.experiments.loss_curve import train_on_rank
from fused_megatron.models.router import ExpertRouter
from fused_megatron.pipeline import Costs, build_schedule
from fused_megatron.pipeline.schedule.action import Kind
from fused_megatron.planning.prediction.measured_steps import RealSteps
from fused_megatron.planning.recorded_step import RecordedStep, record_real_step
from fused_megatron.planning.step_profile import (
    ACTIVATIONS,
    GATHERED,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    StepProfile,
    profile_of,
    recorded_memory,
    transfers_of,
)
from fused_megatron.planning.step_recorder import Work

MOST_TIMED_RANKS = 2
"""More ranks share the cores of a small machine, so that their time says nothing."""
TIMED_STEPS = 3
"""Steps whose median is the time of a run."""
FIRST_TIMED = 2
"""Number of the first of them: the recorded step has number 1."""

Measured = dict[str, float]


def measure_rank(
    rank: int,
    world_size: int,
    config: TrainConfig,
    sleep_ms: tuple[float, float] | None,
    steps: int | None = None,
    lr: float = 0.0,
) -> Measured:
    """Run a training step on this rank, or its schedule on sleeping stages. run_on_ranks calls it on every rank.

    Args:
        config: with model.vocab_size and the size of every axis.
        sleep_ms: milliseconds of forward and backward of a rank's share of a microbatch, for sleeping stages.
        steps: with sleep_ms, steps that overlap; without, train for these steps (loss_curve.py has the figures).
        lr: learning rate of these steps.

    Returns:
        Figures by name. Bytes of tensors: weights, gradients, optimizer; state: their sum; kept: activations of a
        microbatch from its forward to its backward; block_kept: the same of a block; gathered: weights of other ranks
        that stay between steps; peak, peak_activations: at the peak of the step. parameters: their number on this
        rank. flops: of products. <kind>_<axis> and calls_<kind>_<axis>, such as all_reduce_tp: bytes and number of
        transfers; sent_<axis>: bytes of all kinds, and sent: of all axes. step_ms: at most MOST_TIMED_RANKS ranks.
        Of sleeping stages: bubble: share of the step in which the busiest rank waits; simulated_bubble: the same of
        the simulator, whose messages take no time; held: activations at once; step_ms.

    Communication: as the trainer's step.
    """
    if sleep_ms is not None:
        _leave_out_shared_memory()
        return _sleep(rank, config, sleep_ms, steps or 1)
    if steps is not None:
        _leave_out_shared_memory()
        return train_on_rank(config, steps, lr)
    step = recorded_on_rank(config)
    found = figures_of(step)
    if world_size <= MOST_TIMED_RANKS:
        times = RealSteps(step.assembly, torch.device("cpu"), FIRST_TIMED).times(TIMED_STEPS, warm_up=0)
        found["step_ms"] = 1e3 * times.median_s(without_waits=False)
    step.assembly.executor.close()
    return found


def recorded_on_rank(config: TrainConfig) -> RecordedStep:
    """Run and record the first step of a config; every rank of the default process group calls this."""
    _leave_out_shared_memory()
    return record_real_step(config, torch.device("cpu"), _balance_routes)


def _leave_out_shared_memory() -> None:
    """Send all messages through sockets. A ring of shared memory keeps some: the bytes that a rank holds would vary."""
    os.environ["FUSED_MEGATRON_SHARED_MEMORY"] = "off"


def figures_of(step: RecordedStep) -> Measured:
    """Return the bytes and counts of a recorded step by the names of measure_rank."""
    assembly = step.assembly
    schedule = assembly.executor.schedule
    profile = profile_of(step, len(schedule.microbatches))
    peak = recorded_memory(step, schedule.actions[assembly.mesh.pp_rank])
    by_kind: Counter[str] = Counter()
    for memory, num_bytes in peak.peak.items():
        by_kind[memory.kind] += num_bytes
    return {
        "parameters": sum(parameter.numel() for parameter in assembly.parameters.values()),
        **_state(profile),
        **_kept(profile),
        "peak": peak.peak_bytes,
        "peak_activations": by_kind[ACTIVATIONS],
        **_work(step),
    }


def _state(profile: StepProfile) -> Measured:
    held: Counter[str] = Counter()
    for memory, num_bytes in profile.start.items():
        held[memory.kind] += num_bytes
    found: Measured = {
        "weights": held[WEIGHTS],
        "gradients": held[GRADIENTS],
        "optimizer": held[OPTIMIZER],
        "gathered": held[GATHERED],
    }
    return {**found, "state": found["weights"] + found["gradients"] + found["optimizer"]}


def _kept(profile: StepProfile) -> Measured:
    """Return the activations that a microbatch keeps on this rank; of a middle one if there are several."""
    kept = blocks = 0
    names = set()
    microbatch = max(0, profile.num_recorded - 2)
    for key, done in profile.actions.items():
        if key.kind != Kind.FORWARD or key.microbatch != microbatch:
            continue
        for memory, num_bytes in done.delta.items():
            kept += num_bytes * (memory.kind == ACTIVATIONS)
            if memory.kind == ACTIVATIONS and memory.layer.startswith("blocks."):
                blocks += num_bytes
                names.add(memory.layer)
    return {"kept": kept, "block_kept": blocks / max(1, len(names))}


def _work(step: RecordedStep) -> Measured:
    work = step.work()
    found: Counter[str] = Counter({"flops": work[Work("flops")]})
    mesh = step.assembly.mesh
    for (kind, axes), (calls, num_bytes) in transfers_of(work, mesh.sizes, mesh.expert_sizes).items():
        if axes and kind != "receive":
            axis = axes.replace("+", "_")
            found[f"{kind}_{axis}"] += num_bytes
            found[f"calls_{kind}_{axis}"] += calls
            found[f"sent_{axis}"] += num_bytes
            found["sent"] += num_bytes
    return dict(found)


def _balance_routes(model: nn.Module) -> None:
    """Send the same number of tokens to each expert, as the published runs did."""

    def replace(router: nn.Module, arguments: Any, routes: Any) -> None:
        assert isinstance(router, ExpertRouter)
        rows, selected = routes.experts.shape
        experts = torch.arange(rows * selected).reshape(rows, selected) % router.num_experts
        routes.experts.data.copy_(experts)  # as the router's own choice: autograd sees no change

    for module in model.modules():
        if isinstance(module, ExpertRouter):
            module.register_forward_hook(replace)


def _sleep(rank: int, config: TrainConfig, sleep_ms: tuple[float, float], steps: int) -> Measured:
    parallel, training = config.parallel, config.training
    stages = parallel.stages_per_rank or 1
    microbatches = training.global_batch_size // training.microbatch_size // (parallel.data_parallel_size or 1)
    schedule = build_schedule(
        parallel.schedule or ("interleaved_1f1b" if stages > 1 else "1f1b"),
        parallel.pipeline_parallel_size,
        microbatches,
        parallel.stages_per_rank,
        steps,
    )
    # Backward is half for the input and half for the weights, as in the products of a transformer.
    per_rank = schedule.num_stages // schedule.num_ranks
    forward, backward = (1e-3 * each / per_rank for each in sleep_ms)
    costs = Costs(forward, backward / 2, backward / 2)
    group = dist.group.WORLD
    assert group is not None
    result = measure_schedule(schedule, costs, group)
    work_s, step_s = max(result.predicted.busy), statistics.median(result.step_s)
    return {
        "bubble": 1 - work_s / step_s,
        "simulated_bubble": 1 - work_s / result.predicted.makespan,
        "held": result.peak_held[rank],
        "step_ms": 1e3 * step_s,
    }


def largest_of(ranks: list[Measured]) -> Measured:
    """Return for each figure the largest of all ranks."""
    names: Mapping[str, None] = {name: None for each in ranks for name in each}
    return {name: max(each.get(name, 0) for each in ranks) for name in names}

"""Budget of a training step on a GPU: kernels, bytes, waits of the host and collectives, counted without a GPU.

A dry run on the meta device records them for each action of a rank (planning/step_recorder.py). The difference of two
runs whose ranks differ by a layer is the budget of a layer.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.checks import check
from fused_megatron.config import TrainConfig
from fused_megatron.pipeline.schedule.action import COMPUTE, Kind, stages_of
from fused_megatron.planning.dry_run import DryRun
from fused_megatron.planning.step_profile import work_of
from fused_megatron.planning.step_recorder import Work

DEVICE = "meta"


@dataclass(frozen=True)
class Budget:
    """Work of a part of a step.

    Attributes:
        launches: kernels by kind, as in observe/kernel_counts.py.
        moved: bytes that these kernels read and write, by kind.
        collectives: calls by kind, as in observe/record_communication.py, with messages of the pipeline.
        host_syncs: how many times the host waits for the device.
    """

    launches: Mapping[str, int]
    moved: Mapping[str, int]
    collectives: Mapping[str, int]
    host_syncs: int

    @staticmethod
    def of(work: Mapping[Work, int]) -> "Budget":
        """Return the budget of counted work."""
        sums: dict[str, Counter[str]] = {"launches": Counter(), "moved": Counter(), "calls": Counter()}
        for done, number in work.items():
            if done.what in sums and number:
                sums[done.what][done.kind] += number
        return Budget(sums["launches"], sums["moved"], sums["calls"], work.get(Work("host_syncs"), 0))


@dataclass(frozen=True)
class LayerBudget:
    """Budgets of one microbatch in one layer, and in all that is not a layer.

    Attributes:
        forward, backward: a transformer block; backward has what it computes again.
        ends: the rest of the first and of the last stage: embedding, last norm, head, loss.
    """

    forward: Budget
    backward: Budget
    ends: Budget


def layer_budget(config: TrainConfig) -> LayerBudget:
    """Count the work of a layer and of the ends of the model in a microbatch of the config's layout.

    It runs one or two layers for each stage, at full width: seconds for the largest models.

    Args:
        config: as for DryRun.

    Raises:
        InputError: as DryRun; a model whose layers differ.
    """
    kinds = {config.model.has_experts(block) for block in range(config.model.num_layers)}
    check(
        len(kinds) == 1,
        "blocks with and without experts must not be in one model for a budget of a layer "
        "(model.num_dense_layers=0, model.moe_every=1)",
    )
    few, more = (_microbatch(config, layers_per_stage) for layers_per_stage in (1, 2))
    layers, more_layers = few.layers[0], more.layers[0]
    forward, backward = (
        _divided(_difference(more.first[of], few.first[of]), more_layers - layers) for of in ("forward", "backward")
    )
    ends: Counter[Work] = Counter()
    parts = [few.first] if few.last is None else [few.first, few.last]
    for part, layers in zip(parts, few.layers, strict=False):
        for of, layer in (("forward", forward), ("backward", backward)):
            ends.update(_difference(part[of], Counter({work: layers * number for work, number in layer.items()})))
    return LayerBudget(Budget.of(forward), Budget.of(backward), Budget.of(ends))


@dataclass(frozen=True)
class StepBudget:
    """Budgets of a whole step of the first rank.

    Attributes:
        update: all that a step does once: gradients are zeroed and summed over the replicas, the norm, the optimizer.
        step: everything.
        num_microbatches: of a replica.
        num_layers: layers of the rank.
    """

    update: Budget
    step: Budget
    num_microbatches: int
    num_layers: int


def step_budget(config: TrainConfig) -> StepBudget:
    """Count the work of a whole step of rank 0.

    Args:
        config: as for DryRun.

    Raises:
        InputError: as DryRun.
    """
    run = DryRun(config, DEVICE)
    profile = run.profile(0)
    # A receive is posted in an action of another microbatch, and so counts with the whole step.
    once = {done: number for done, number in profile.once.items() if done.kind != "receive"}
    return StepBudget(
        Budget.of(once),
        Budget.of(work_of(profile, run.schedule.actions[0])),
        run.num_microbatches,
        _layers(run, 0),
    )


@dataclass(frozen=True)
class _Microbatch:
    """Work of a microbatch by direction, on the first and (in a pipeline) the last rank, and their layers."""

    first: Mapping[str, Counter[Work]]
    last: Mapping[str, Counter[Work]] | None
    layers: tuple[int, ...]


def _microbatch(config: TrainConfig, layers_per_stage: int) -> _Microbatch:
    stages = plan_pipeline(config).num_stages
    parallel, training = config.parallel, config.training
    replicas = parallel.data_parallel_size or 1
    # As many microbatches as the schedule needs; a dry run takes a usual one.
    batch = replicas * training.microbatch_size * max(4, 2 * parallel.pipeline_parallel_size)
    shallow = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=layers_per_stage * stages),
        training=dataclasses.replace(training, global_batch_size=batch),
    )
    run = DryRun(shallow, DEVICE)
    ranks = run.pipeline_ranks()
    ends = [0] if len(ranks) == 1 else [0, len(ranks) - 1]
    found = [_directions(run, ranks[pp_rank]) for pp_rank in ends]
    return _Microbatch(found[0], found[1] if len(found) > 1 else None, tuple(_layers(run, pp) for pp in ends))


def _directions(run: DryRun, rank: int) -> dict[str, Counter[Work]]:
    """Return the work of a usual microbatch in forward and backward: not the first one, nor the last."""
    profile = run.profile(rank)
    usual = max(0, profile.num_recorded - 2)
    found: dict[str, Counter[Work]] = {"forward": Counter(), "backward": Counter()}
    for key, done in profile.actions.items():
        if key.kind in COMPUTE and key.microbatch == usual:
            found["forward" if key.kind == Kind.FORWARD else "backward"].update(done.work)
    return found


def _layers(run: DryRun, pp_rank: int) -> int:
    spans = (run.spans[stage] for stage in stages_of(run.plan.placement, pp_rank))
    return sum(span.stop - span.start for span in spans)


def _difference(more: Mapping[Work, int], less: Mapping[Work, int]) -> Counter[Work]:
    return Counter({work: more.get(work, 0) - less.get(work, 0) for work in {**more, **less}})


def _divided(work: Mapping[Work, int], layers: int) -> Counter[Work]:
    assert layers > 0 and all(number % layers == 0 for number in work.values()), "layers of one form do the same"
    return Counter({done: number // layers for done, number in work.items()})

"""Dry run of a rank: memory, computation and transfers of one training step, without memory for the tensors.

The run: a dry run builds the trainer's own parts of a rank (assembly/assemble.py) and runs one training step
(assembly/training_step.py) on fake tensors, with a fake group of all ranks. It runs the smallest number of microbatches
that has every kind of action of the schedule: one for most schedules. It runs all microbatches if an action depends on
other microbatches. The recorder sees when an op allocates a storage, and when the storage is freed.

The extrapolation: all microbatches of a step do the same. step_profile.py walks the rank's actions for all microbatches
and adds up what each kind of action allocated, freed, computed and sent. Pipeline ranks whose stages have the same form
share one run.

Steps that overlap (PipeDream) have the actions of one long step of 1F1B, with updates in between. So their memory is of
that step, with every version of the weights. Sums of gradients over replicas count at its end only.

Left out: fragments of the allocator; the CUDA context; the buffers of NCCL; temporary memory inside a kernel or a
transport. The ranks of a real run measure how many chunks overlap=True makes of a tensor-parallel product; a dry run
takes one chunk. Tokens have no values: where a size depends on values, the largest size counts (each rank looks up
every token). A message stops counting once it is sent, although a slow receiver would make the rank keep it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fused_megatron.assembly.pipeline_plan import PipelinePlan, plan_pipeline, stage_spans
from fused_megatron.checks import InputError, check, check_one_of
from fused_megatron.config import TrainConfig
from fused_megatron.data_parallel.placement import ZERO_STAGES, zero_stage
from fused_megatron.expert_parallel import ASSUMED_ROUTES
from fused_megatron.mesh import coordinates, rank_at
from fused_megatron.models import StageSpan
from fused_megatron.pipeline.schedule.action import Action, Kind, Schedule, stages_of
from fused_megatron.planning.recorded_step import RecordedStep, record_fake_step
from fused_megatron.planning.step_profile import (
    ACTIVATIONS,
    LOSS,
    WEIGHTS,
    ActionKey,
    Memory,
    StepMemory,
    StepProfile,
    Transfers,
    axes_of,
    profile_of,
    recorded_memory,
    transfers_of,
    walk,
    work_of,
)
from fused_megatron.planning.step_recorder import Work


@dataclass(frozen=True)
class RankReport:
    """Memory, computation and transfers of one rank in a training step.

    Attributes:
        rank: global rank.
        pp_rank: rank in the pipeline.
        spans: the layers of each stage, by index of the stage.
        groups: the global ranks of each of its groups, by axis ("tp", "pp", "dp", "cp"); no entry for an axis of length
            1.
        num_parameters: parameters of this rank, with the padding of the vocabulary.
        full_parameters: parameters of its stages, over all tensor-parallel ranks.
        assembled_bytes: bytes held before the first step.
        held_bytes: bytes held after a step.
        peak_bytes: the most bytes held at once.
        at: position and action of the peak; None if it is outside of the schedule's actions (the batch, the update).
        peak: bytes at the peak, by kind of memory and layer.
        flops: floating-point operations of the products, as torch counts them.
        transfers: calls and bytes by kind ("all_reduce", "send", ..) and axis ("tp", "pp", "dp", "cp"; several joined
            by "+").
        host_syncs: how many times the host waits for the device.
        kept: for each stage, bytes that a microbatch keeps from forward for backward, by layer, without its input.
        sent: for each stage, bytes of each kind of tensor-parallel transfer in forward and backward of a microbatch.
        sent_to_context: the same of the transfers of attention between context-parallel ranks.
        sent_to_experts: the same of the transfers of tokens to experts and back, over ep and etp.
    """

    rank: int
    pp_rank: int
    spans: Mapping[int, StageSpan]
    groups: Mapping[str, tuple[int, ...]]
    num_parameters: int
    full_parameters: int
    assembled_bytes: int
    held_bytes: int
    peak_bytes: int
    at: tuple[int, Action] | None
    peak: Mapping[Memory, int]
    flops: int
    transfers: Mapping[tuple[str, str], Transfers]
    host_syncs: int
    kept: Mapping[int, Mapping[Memory, int]]
    sent: Mapping[int, Mapping[str, int]]
    sent_to_context: Mapping[int, Mapping[str, int]]
    sent_to_experts: Mapping[int, Mapping[str, int]]

    def by_kind(self) -> dict[str, int]:
        """Return the bytes at the peak for each kind of memory."""
        found: Counter[str] = Counter()
        for memory, num_bytes in self.peak.items():
            found[memory.kind] += num_bytes
        return dict(found)


class _Known(NamedTuple):
    """Results of the recorded run of one rank; ranks of the same form share them."""

    profile: StepProfile
    stages: tuple[int, ...]
    num_parameters: int
    full_parameters: int
    assembled_bytes: int
    whole: StepMemory | None = None
    """Memory over the recorded step, if it had all microbatches."""


class DryRun:
    """Memory, computation and transfers of each rank of a layout in a training step.

        run = DryRun(load_config(Path("gpt_1t.toml")))
        report = run.rank(1234)
        print(report.peak_bytes, report.at, report.transfers["all_reduce", "tp"])

    Args:
        config: model.vocab_size must be given. parallel.data_parallel_size=None counts as 1.
        device: device of the fake tensors. A CPU may keep other tensors for backward than a GPU, because it runs other
            kernels. "cuda" needs a GPU, but none of its memory. "meta" stands for a GPU without one: modules take the
            branches of a GPU, attention is torch's FlashAttention, and the work of a profile has kernels.
        routes: routes of tokens to experts: "balanced", or "worst": every token goes to the experts of this rank, as
            many of them as it can.

    Raises:
        InputError: sizes that do not fit; no vocab_size; "cuda" without a GPU.

    Memory: Python objects only.
    """

    def __init__(self, config: TrainConfig, device: str = "cpu", routes: str = "balanced") -> None:
        check(
            config.model.vocab_size is not None,
            "model.vocab_size=None must be given, since a dry run reads no data (--model.vocab-size 50257)",
        )
        check(
            device != "cuda" or torch.cuda.is_available(),
            "device='cuda' needs a GPU, though none of its memory: autograd asks it for its streams (device='cpu')",
        )
        check_one_of("routes", routes, ASSUMED_ROUTES)
        check(
            routes == "balanced" or config.model.num_experts is not None,
            f"routes={routes!r} needs a model with experts (model.num_experts)",
        )
        config.model.check_trainable()
        self.routes = routes
        parallel = config.parallel
        parallel = dataclasses.replace(parallel, data_parallel_size=parallel.data_parallel_size or 1)
        self.config, self.device = dataclasses.replace(config, parallel=parallel), torch.device(device)
        self.world_size = parallel.num_ranks
        self.config.check_data_parallel(parallel.data_parallel_size or 1)
        self.plan: PipelinePlan = plan_pipeline(self.config, asynchronous=True)
        self.spans = stage_spans(self.config, self.plan)
        training = config.training
        replicas = self.config.parallel.data_parallel_size or 1
        self.num_microbatches = training.global_batch_size // training.microbatch_size // replicas
        self.schedule: Schedule = self.plan.lowered_schedule(self.num_microbatches)
        self._one_by_one: tuple[DryRun, DryRun] | None = None
        if self.plan.is_asynchronous:
            self._one_by_one = self._as_1f1b(1), self._as_1f1b(self.plan.most_overlapping(self.num_microbatches))
        self._sizes = {
            "pp": parallel.pipeline_parallel_size,
            "dp": replicas,
            "cp": parallel.context_parallel_size,
            "tp": parallel.tensor_parallel_size,
        }
        ep, etp = parallel.expert_parallel_size, parallel.expert_tensor_parallel_size
        self._expert_sizes = {
            "pp": parallel.pipeline_parallel_size,
            "edp": parallel.expert_replicas(replicas),
            "ep": ep,
            "etp": etp,
        }
        self._known: dict[object, _Known] = {}

    def pipeline_ranks(self) -> list[int]:
        """Return one global rank for each pipeline rank: the one with tp, cp and dp rank 0."""
        return [pp_rank * (self.world_size // self._sizes["pp"]) for pp_rank in range(self._sizes["pp"])]

    def rank(self, rank: int) -> RankReport:
        """Return the report of a rank. A run takes seconds for the largest models; ranks of the same form share one.

        Raises:
            InputError: no such rank; there is a process group already.
        """
        check(0 <= rank < self.world_size, f"rank={rank} must be in [0, {self.world_size}), the ranks of the layout")
        pp_rank = coordinates(rank, self._sizes)["pp"]
        if self._one_by_one is not None:
            return self._overlapping(rank, pp_rank, *self._one_by_one)
        stages, actions = stages_of(self.plan.placement, pp_rank), self.schedule.actions[pp_rank]
        known = self._known_of(rank, pp_rank, stages)
        profile = _Names(known.stages, stages, self.spans).renamed(known.profile)
        memory = known.whole or walk(profile, actions)
        work = work_of(profile, actions)
        return RankReport(
            rank=rank,
            pp_rank=pp_rank,
            spans={stage: self.spans[stage] for stage in stages},
            groups=self._groups(rank),
            num_parameters=known.num_parameters,
            full_parameters=known.full_parameters,
            assembled_bytes=known.assembled_bytes,
            held_bytes=memory.held_bytes,
            peak_bytes=memory.peak_bytes,
            at=memory.at,
            peak=memory.peak,
            flops=work[Work("flops")],
            transfers=transfers_of(work, self._sizes, self._expert_sizes),
            host_syncs=work[Work("host_syncs")],
            kept={stage: _kept(profile, stage) for stage in stages},
            sent={stage: self._sent(profile, stage, "tp") for stage in stages},
            sent_to_context={stage: self._sent(profile, stage, "cp") for stage in stages},
            sent_to_experts={stage: self._sent_to_experts(profile, stage) for stage in stages},
        )

    def _as_1f1b(self, num_steps: int) -> DryRun:
        """Return the dry run of a number of steps as one step of 1f1b, which has the same stages and actions."""
        parallel, training = self.config.parallel, self.config.training
        batch = num_steps * training.global_batch_size
        config = dataclasses.replace(
            self.config,
            parallel=dataclasses.replace(parallel, schedule="1f1b"),
            training=dataclasses.replace(training, global_batch_size=batch),
        )
        return DryRun(config, self.device.type, self.routes)

    def _overlapping(self, rank: int, pp_rank: int, one: DryRun, many: DryRun) -> RankReport:
        """Return the work of one step of a rank, and its memory in many steps with all versions of the weights."""
        step, found = one.rank(rank), many.rank(rank)
        peak = Counter(found.peak)
        older = (self.plan.weight_versions()[pp_rank] - 1) * peak[Memory(WEIGHTS)]
        peak[Memory(WEIGHTS)] += older
        return dataclasses.replace(
            step,
            held_bytes=found.held_bytes + older,
            peak_bytes=found.peak_bytes + older,
            at=found.at,
            peak=peak,
        )

    def profile(self, rank: int) -> StepProfile:
        """Return the profile of a rank's actions; raise as rank()."""
        check(0 <= rank < self.world_size, f"rank={rank} must be in [0, {self.world_size}), the ranks of the layout")
        pp_rank = coordinates(rank, self._sizes)["pp"]
        stages = stages_of(self.plan.placement, pp_rank)
        known = self._known_of(rank, pp_rank, stages)
        return _Names(known.stages, stages, self.spans).renamed(known.profile)

    def _known_of(self, rank: int, pp_rank: int, stages: Sequence[int]) -> _Known:
        """Return the run of this rank, or of a rank with stages of the same form; its dp rank makes no difference."""
        forms = tuple(
            (span.first, span.last, self._blocks_with_experts(span), *self._neighbours(stage))
            for stage in stages
            for span in [self.spans[stage]]
        )
        kinds = {(stages.index(stage), kind) for stage, kind in self._keys(self.schedule, pp_rank) if stage in stages}
        at = coordinates(rank, self._sizes)
        key = forms, frozenset(kinds), at["tp"], at["cp"]
        if key not in self._known:
            self._known[key] = self._run(rank, tuple(stages), self._fewest_microbatches(pp_rank))
        known = self._known[key]
        # A step leaves only its losses (8 bytes each). If it leaves more, an action depends on other microbatches: a
        # B and a W of two stages may share a gradient, and the schedule decides which of them frees it.
        held = walk(_Names(known.stages, stages, self.spans).renamed(known.profile), self.schedule.actions[pp_rank])
        if held.held_bytes == sum(known.profile.start.values()) + 8 * self.num_microbatches:
            return known
        own = key, pp_rank
        if own not in self._known:
            # Sums of gradients of several microbatches may be under way at once, which no profile of an action knows.
            self._known[own] = self._run(rank, tuple(stages), self.num_microbatches, self.schedule.actions[pp_rank])
        return self._known[own]

    def _blocks_with_experts(self, span: StageSpan) -> tuple[bool, ...]:
        """Return for each block of a stage whether it has experts."""
        return tuple(self.config.model.has_experts(block) for block in range(span.start, span.stop))

    def _neighbours(self, stage: int) -> tuple[bool, bool]:
        """Return whether the previous stage and the next stage are on the same rank."""
        placement, last = self.plan.placement, self.plan.num_stages - 1
        before, behind = max(0, stage - 1), min(last, stage + 1)
        return placement[before] == placement[stage], placement[behind] == placement[stage]

    def _run(
        self, rank: int, stages: tuple[int, ...], num_microbatches: int, actions: Sequence[Action] | None = None
    ) -> _Known:
        training = self.config.training
        batch = num_microbatches * training.microbatch_size * self._sizes["dp"]
        few = dataclasses.replace(self.config, training=dataclasses.replace(training, global_batch_size=batch))
        step: RecordedStep = record_fake_step(few, rank, self.device, self.routes)
        return _Known(
            profile_of(step, self.num_microbatches),
            stages,
            sum(parameter.numel() for parameter in step.assembly.parameters.values()),
            step.assembly.model.num_parameters(),
            step.assembled_bytes,
            None if actions is None else recorded_memory(step, actions),
        )

    def _fewest_microbatches(self, pp_rank: int) -> int:
        """Return the smallest number of microbatches that has every kind of action of the whole step."""
        wanted = self._keys(self.schedule, pp_rank)
        # With ZeRO, the first forward of a step gathers weights and its last backward sends gradients. A third
        # microbatch, between the two, stands for all others.
        replicas = self.config.replica_counts(self._sizes["dp"])
        zero = zero_stage(self.config.parallel.zero_stage, max(replicas))
        for count in range(3 if ZERO_STAGES[zero].state else 1, self.num_microbatches):
            try:
                schedule = self.plan.lowered_schedule(count)
            except InputError:  # too few for this schedule
                continue
            if self._keys(schedule, pp_rank) == wanted:
                return count
        return self.num_microbatches

    @staticmethod
    def _keys(schedule: Schedule, pp_rank: int) -> set[tuple[int, Kind]]:
        return {(action.stage, action.kind) for action in schedule.actions[pp_rank]}

    def _groups(self, rank: int) -> dict[str, tuple[int, ...]]:
        at, found = coordinates(rank, self._sizes), {}
        for axis in ("tp", "pp", "dp", "cp"):
            same = {other: at[other] for other in at if other != axis}
            if self._sizes[axis] > 1:
                found[axis] = tuple(rank_at({**same, axis: index}, self._sizes) for index in range(self._sizes[axis]))
        return found

    def _sent(self, profile: StepProfile, stage: int, axis: str) -> dict[str, int]:
        """Return the bytes over an axis in a microbatch, without sums and gathers of weights and without experts."""
        return _sum_by_kind(
            (work, number)
            for work, number in _bytes_of_a_microbatch(profile, stage)
            if not work.of_replicas and not work.of_experts and axes_of(work.group, self._sizes) == axis
        )

    def _sent_to_experts(self, profile: StepProfile, stage: int) -> dict[str, int]:
        return _sum_by_kind(each for each in _bytes_of_a_microbatch(profile, stage) if each[0].of_experts)


def _bytes_of_a_microbatch(profile: StepProfile, stage: int) -> Iterator[tuple[Work, int]]:
    """Yield the bytes of transfers in the actions of a microbatch."""
    for key, done in profile.actions.items():
        for work, number in done.work.items() if _is_usual(profile, key, stage) else ():
            if work.what == "bytes" and work.group:
                yield work, number


def _sum_by_kind(found: Iterable[tuple[Work, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for work, number in found:
        total[work.kind] += number
    return {kind: num_bytes for kind, num_bytes in total.items() if num_bytes}


def _is_usual(profile: StepProfile, key: ActionKey, stage: int) -> bool:
    """Return whether an action is of this stage, and of the microbatch that stands for most others."""
    return key.stage == stage and key.microbatch == max(0, profile.num_recorded - 2)


def _kept(profile: StepProfile, stage: int) -> dict[Memory, int]:
    """Return the bytes that a forward leaves for backward, without the copy that is sent."""
    kept: dict[Memory, int] = {}
    for key, done in profile.actions.items():
        if _is_usual(profile, key, stage) and key.kind == Kind.FORWARD:
            kept = {memory: num_bytes for memory, num_bytes in done.delta.items() if memory.kind in (ACTIVATIONS, LOSS)}
    return kept


class _Names:
    """Translation of stages and blocks between two ranks with the same form."""

    def __init__(self, known: Sequence[int], stages: Sequence[int], spans: Sequence[StageSpan]) -> None:
        self._stages = dict(zip(known, stages, strict=True))
        self._layers = {
            f"blocks.{spans[theirs].start + i}": f"blocks.{spans[ours].start + i}"
            for theirs, ours in self._stages.items()
            for i in range(spans[theirs].stop - spans[theirs].start)
        }

    def renamed(self, profile: StepProfile) -> StepProfile:
        actions = {}
        for key, done in profile.actions.items():
            delta, at_peak = self._memory(done.delta), self._memory(done.at_peak)
            renamed = dataclasses.replace(done, delta=delta, at_peak=at_peak)
            actions[key._replace(stage=self._stages.get(key.stage, key.stage))] = renamed
        return dataclasses.replace(profile, actions=actions)

    def _memory(self, memory: Mapping[Memory, int]) -> Counter[Memory]:
        return Counter({Memory(m.kind, self._layers.get(m.layer, m.layer)): n for m, n in memory.items()})

"""Lower bounds of the time and the memory of a layout, without building its schedule for the whole step."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from operator import mul
from typing import Any, NamedTuple

from fused_megatron.config import ParallelConfig, TrainConfig, TransformerConfig
from fused_megatron.data_parallel.placement import ZERO_STAGES
from fused_megatron.models import StageSpan, cut_stages
from fused_megatron.pipeline.schedule.action import Kind, loop_placement, stages_of, v_placement
from fused_megatron.pipeline.schedule.schedules import SCHEDULES, build_schedule
from fused_megatron.planning.engine_memory import CONTEXT_BYTES, SCATTERED, communicator_bytes
from fused_megatron.planning.optimizer_memory import optimizer_bytes
from fused_megatron.planning.parameter_counts import ParameterCounts, stage_parameters, vocabulary_elements
from fused_megatron.planning.prediction.action_work import Work
from fused_megatron.planning.prediction.block_time import StageTimes
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.prediction.end_of_step import message_s, reduction_s, update_s
from fused_megatron.planning.prediction.engine import OWN, engine_of
from fused_megatron.planning.prediction.shared_cores import of_one_rank
from fused_megatron.planning.rank_communication import message_bytes
from fused_megatron.planning.search.layouts import Layout, Settings, sequence_choices, train_config
from fused_megatron.planning.search.pipelines import pipelines
from fused_megatron.planning.working_memory import KnownBlocks, stage_bytes

_ROUNDING = 1 - 1e-9
"""Sums in another order differ by rounding; a bound must not exceed the prediction."""

Form = tuple[Any, ...]
"""Stages of one form need the same time and memory: their blocks, and whether they have the embedding or the head."""


@lru_cache(maxsize=4096)
def placement_of(schedule: str, num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """Return the rank of each stage."""
    is_v = SCHEDULES[schedule].placement == "v"
    return v_placement(num_ranks) if is_v else loop_placement(num_ranks, stages_per_rank)


@lru_cache(maxsize=4096)
def live_activations(schedule: str, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> tuple[int, ...]:
    """Return the most activations of a stage that each rank holds at once, until their backward or I."""
    found = []
    for actions in build_schedule(schedule, num_ranks, num_microbatches, stages_per_rank).actions:
        live = most = 0
        for _, kind, _ in actions:
            live += (kind == Kind.FORWARD) - (kind in (Kind.BACKWARD, Kind.INPUT_GRAD))
            most = max(most, live)
        found.append(most)
    return tuple(found)


class Share(NamedTuple):
    """Stages of a rank, and the stages before the first of them.

    Attributes:
        rank: pipeline rank.
        own: for each form, the number of the rank's stages.
        before: for each form, the number of stages before its first stage.
        hops: messages between ranks on the way to its first stage.
        num_blocks: blocks of its stages.
    """

    rank: int
    own: tuple[int, ...]
    before: tuple[int, ...]
    hops: int
    num_blocks: int


class Cut(NamedTuple):
    """Stages of a placement by their form.

    Attributes:
        forms: the forms, in the order in which they appear.
        spans: a stage of each form.
        number: stages of each form.
        of_rank: indices of the forms of each rank's stages.
        shares: the first and the last rank, and of each group of ranks with the same forms the one that starts last.
        hops: messages between ranks on the way from the first to the last stage.
    """

    forms: tuple[Form, ...]
    spans: tuple[StageSpan, ...]
    number: tuple[int, ...]
    of_rank: tuple[tuple[int, ...], ...]
    shares: tuple[Share, ...]
    hops: int


class FormCosts(NamedTuple):
    """Seconds of F, of B, of W, and of F and B for a microbatch in a stage of each form."""

    forwards: tuple[float, ...]
    backwards: tuple[float, ...]
    weight_grads: tuple[float, ...]
    wholes: tuple[float, ...]


def _cut(model: TransformerConfig, placement: tuple[int, ...]) -> Cut:
    forms: dict[Form, int] = {}
    one_of: list[StageSpan] = []
    spans, of_stage = cut_stages(model, len(placement), placement=placement), []
    for span in spans:
        form = (tuple(model.has_experts(block) for block in range(span.start, span.stop)), span.first, span.last)
        if form not in forms:
            forms[form] = len(forms)
            one_of.append(span)
        of_stage.append(forms[form])

    def numbers(indices: Sequence[int]) -> tuple[int, ...]:
        return tuple(indices.count(index) for index in range(len(forms)))

    shares: dict[object, Share] = {}
    of_rank, num_ranks = [], max(placement) + 1
    for rank in range(num_ranks):
        stages = stages_of(placement, rank)
        first, own = stages[0], [of_stage[stage] for stage in stages]
        of_rank.append(tuple(own))
        hops = sum(placement[stage] != placement[stage - 1] for stage in range(1, first + 1))
        num_blocks = sum(spans[stage].stop - spans[stage].start for stage in stages)
        share = Share(rank, numbers(own), numbers(of_stage[:first]), hops, num_blocks)
        # Ranks with the same stages do the same work; the first stages of later ranks start later.
        shares[rank if rank in (0, num_ranks - 1) else share.own] = share
    hops = sum(before != after for before, after in pairwise(placement))
    return Cut(tuple(forms), tuple(one_of), numbers(of_stage), tuple(of_rank), tuple(shares.values()), hops)


def _dot(numbers: Sequence[int], values: Sequence[float]) -> float:
    return sum(map(mul, numbers, values))


@lru_cache(maxsize=64)
def splits_backward(schedule: str, stages_per_rank: int) -> bool:
    """Return whether the schedule has W actions, which may run after the last I of a rank."""
    actions = build_schedule(schedule, 2, 4, stages_per_rank).actions
    return any(action.kind == Kind.WEIGHT_GRAD for rank in actions for action in rank)


class Floors:
    """Lower bounds of predict_step and rank_memory for the layouts of one workload; layouts share what they can.

    Args:
        base: the workload.
        num_gpus: GPUs of the layouts.
        cluster: of the GPUs.
    """

    def __init__(self, base: TrainConfig, num_gpus: int, cluster: Cluster) -> None:
        self._base, self._cluster, self._engine = base, of_one_rank(cluster, num_gpus), engine_of(OWN)
        self._cuts: dict[tuple[int, ...], Cut] = {}
        self._times: dict[Form, StageTimes] = {}
        self._works: dict[Form, dict[tuple[bool, str], tuple[Work, Work, Work]]] = {}
        self._end_times: dict[Form, list[float]] = {}
        self._seconds: dict[Form, tuple[float, float, float]] = {}
        self._form_costs: dict[Form, FormCosts] = {}
        self._floors: dict[Form, float] = {}
        self._bytes: dict[Form, int] = {}
        self._kept: dict[Form, tuple[int, int]] = {}
        self._blocks: dict[Form, KnownBlocks] = {}
        self._parameters: dict[Form, ParameterCounts] = {}
        self._of_rank: dict[Form, ParameterCounts] = {}
        self._parallels: dict[tuple[Layout, int], ParallelConfig] = {}

    def seconds(self, layout: Layout, settings: Settings) -> float:
        """Return a lower bound of the seconds of a step.

        A rank starts when a microbatch has passed all stages before its first one. Then it does its own work. If its
        last action is a whole backward, the stages before its first one still follow. The rank of the first stage ends
        last then; the reduction of its gradients and the update follow. This rank also waits for the microbatches that
        the last stage passes back to it, one after the other.
        """
        key = layout, settings
        if key not in self._floors:
            self._floors[key] = self._least_seconds(layout, settings)
        return self._floors[key]

    def seconds_of_actions(self, layout: Layout, settings: Settings) -> float:
        """Return a lower bound of `seconds` for all ZeRO stages: nothing is sent to replicas, and nothing updated."""
        settings = settings._replace(zero_stage=0)
        key = layout, settings, "actions"
        if key not in self._floors:
            self._floors[key] = _ROUNDING * (max(self._ends(layout, settings)) + 1e-3 * self._cluster.step_ms)
        return self._floors[key]

    def _least_seconds(self, layout: Layout, settings: Settings) -> float:
        placement = placement_of(settings.schedule, layout.pp, settings.stages_per_rank)
        cut, parallel = self.cut(placement), self._parallel(layout, settings)
        costs, config = self._costs(layout, settings, placement), self._stage_times(layout, settings)[1].config
        *ends, latest = self._ends(layout, settings)
        longest, updated = max(ends), 0.0
        for share, end in zip(cut.shares, ends, strict=True):
            if share.rank in (0, layout.pp - 1):
                parameters = self._rank_parameters(layout, config, placement, share.rank).total
                size, backwards = self._base.training.element_bytes, _dot(share.own, costs.backwards)
                reduced = reduction_s(self._cluster, self._engine, parallel, size, parameters, backwards)
                update = update_s(self._cluster, self._engine, parallel, parameters, share.num_blocks)
                longest, updated = max(longest, end + reduced), max(updated, update)
                if share.rank == 0:
                    longest = max(longest, latest + reduced)
        return _ROUNDING * (longest + updated + 1e-3 * self._cluster.step_ms)

    def _ends(self, layout: Layout, settings: Settings) -> list[float]:
        """Return lower bounds of the ends of ranks, one for each of Cut.shares, and of the end of the first rank."""
        if not ZERO_STAGES[settings.zero_stage].gradients:  # the actions send nothing
            settings = settings._replace(zero_stage=0)
        key = layout, settings
        if key not in self._end_times:
            self._end_times[key] = self._least_ends(layout, settings)
        return self._end_times[key]

    def _least_ends(self, layout: Layout, settings: Settings) -> list[float]:
        placement = placement_of(settings.schedule, layout.pp, settings.stages_per_rank)
        costs, config = self._costs(layout, settings, placement), self._stage_times(layout, settings)[1].config
        number, parallel = self.num_microbatches(layout, settings), self._parallel(layout, settings)
        sent = message_s(self._cluster, self._engine, parallel, message_bytes(config)) if layout.pp > 1 else 0.0
        cut = self.cut(placement)
        splits = splits_backward(settings.schedule, settings.stages_per_rank)
        ends, latest = [], 0.0
        for share in cut.shares:
            end = number * _dot(share.own, costs.wholes) + _dot(share.before, costs.forwards) + share.hops * sent
            ends.append(end)
            latest = max(latest, end + _dot(share.before, costs.backwards) + share.hops * sent)
        first, last = cut.of_rank[0][0], cut.of_rank[placement[-1]][-1]
        passed = _dot(cut.number, costs.wholes) + (number - 1) * costs.wholes[last] + 2 * cut.hops * sent
        if splits:  # W of the first stage follows its last I; every other W can wait
            passed -= _dot(cut.number, costs.weight_grads) - costs.weight_grads[first]
            passed -= (number - 1) * costs.weight_grads[last]
        return [*ends, max(ends[0] if splits else latest, passed)]

    def least_seconds(self, layout: Layout, microbatch_size: int, sequence_parallel: bool) -> float:
        """Return a lower bound of `seconds` for all settings with this size of microbatches.

        The ranks share the work of a step, and a microbatch passes all stages and comes back. Shorter stages take no
        less time together.
        """
        settings = Settings(microbatch_size, sequence_parallel, "1f1b", 1)
        placement = placement_of("1f1b", layout.pp, 1)
        costs, number = self._costs(layout, settings, placement), self.cut(placement).number
        whole = _dot(number, costs.wholes)
        share = self.num_microbatches(layout, settings) * whole / layout.pp
        return _ROUNDING * max(share, whole - _dot(number, costs.weight_grads))

    def memory(self, layout: Layout, settings: Settings) -> int:
        """Return a lower bound of the bytes of the rank that needs most."""
        placement = placement_of(settings.schedule, layout.pp, settings.stages_per_rank)
        number = min(self.num_microbatches(layout, settings), 2 * layout.pp)
        live = live_activations(settings.schedule, layout.pp, settings.stages_per_rank, number)
        return max(self._rank_bytes(layout, settings, placement, rank, live[rank]) for rank in {0, layout.pp - 1})

    def least_memory(self, layout: Layout) -> int:
        """Return a lower bound of `memory` for all settings: one activation of a stage is held."""
        shards = sequence_choices(self._base, layout)[-1]
        found = []
        for name, per_rank in pipelines(layout.pp, self._base.model.num_layers):
            settings = Settings(1, shards, name, per_rank, "full", None, self.zero_stages(layout)[-1])
            placement = placement_of(name, layout.pp, per_rank)
            found.append(max(self._rank_bytes(layout, settings, placement, rank, 1) for rank in {0, layout.pp - 1}))
        return min(found)

    def fullest_ranks(self, layout: Layout, settings: Settings) -> list[int]:
        """Return pipeline ranks of which one needs most memory.

        Of ranks whose stages have the same forms the first one holds most microbatches, if stages go round the ranks.
        """
        placement = placement_of(settings.schedule, layout.pp, settings.stages_per_rank)
        if SCHEDULES[settings.schedule].placement == "v":
            return list(range(layout.pp))
        first: dict[Form, int] = {}
        for rank, forms in enumerate(self.cut(placement).of_rank):
            first.setdefault(forms, rank)
        return list(first.values())

    def num_microbatches(self, layout: Layout, settings: Settings) -> int:
        """Return the microbatches of a step."""
        return self._base.training.global_batch_size // layout.dp // settings.microbatch_size

    def zero_stages(self, layout: Layout) -> tuple[int, ...]:
        """Return the ZeRO stages that differ: with one replica of everything all are the same."""
        replicas = layout.dp * layout.cp
        of_experts = layout.dp * layout.cp * layout.tp // (layout.ep * layout.etp)
        is_shared = replicas > 1 or (self._base.model.num_experts is not None and of_experts > 1)
        return (0, 1, 2, 3) if is_shared else (0,)

    def _costs(self, layout: Layout, settings: Settings, placement: tuple[int, ...]) -> FormCosts:
        """Return the seconds of a microbatch in a stage of each form."""
        key, times = self._stage_times(layout, settings)
        if (key, placement) not in self._form_costs:
            cut, found = self.cut(placement), []
            for form, span in zip(cut.forms, cut.spans, strict=True):
                if (known := self._seconds.get((key, form))) is None:
                    known = self._seconds[key, form] = times.seconds_of_stage(span)
                found.append(known)
            forwards, backwards, weight_grads = zip(*found, strict=True)
            wholes = tuple(map(sum, zip(forwards, backwards, strict=True)))
            self._form_costs[key, placement] = FormCosts(forwards, backwards, weight_grads, wholes)
        return self._form_costs[key, placement]

    def _stage_times(self, layout: Layout, settings: Settings) -> tuple[Form, StageTimes]:
        placements = ZERO_STAGES[settings.zero_stage]
        gathers = (layout.dp, placements.weights) if placements.gradients else ()
        key = (
            (layout.tp, layout.cp, layout.ep, layout.etp, gathers, layout.pp > 1),
            (settings.microbatch_size, settings.sequence_parallel, settings.recompute, settings.recompute_blocks),
        )
        if key not in self._times:
            config = train_config(self._base, layout, settings)
            shared = self._works.setdefault((*key[0][:4], *key[1][:2]), {})
            self._times[key] = StageTimes(config, self._cluster, self._engine, shared)
        return key, self._times[key]

    def cut(self, placement: tuple[int, ...]) -> Cut:
        """Return the forms of the stages of a placement."""
        if placement not in self._cuts:
            self._cuts[placement] = _cut(self._base.model, placement)
        return self._cuts[placement]

    def _rank_bytes(
        self, layout: Layout, settings: Settings, placement: tuple[int, ...], rank: int, num_live: int
    ) -> int:
        kept, in_backward = self._activation_bytes(layout, settings, placement, rank)
        # The most activations are held when a backward begins, which then needs its own bytes.
        needed = (num_live - 1) * kept + in_backward
        fragments = int(SCATTERED * needed) if self._cluster.device == "cuda" else 0
        return self._held_bytes(layout, settings, placement, rank) + needed + fragments

    def _activation_bytes(
        self, layout: Layout, settings: Settings, placement: tuple[int, ...], rank: int
    ) -> tuple[int, int]:
        """Return the least bytes that a stage of a rank keeps for a microbatch, and that its backward needs."""
        of_all = (layout.tp, layout.cp, layout.ep, layout.etp, *settings[:2], *settings[4:6])
        key = (of_all, placement, rank)
        if key not in self._kept:
            config, cut = self._stage_times(layout, settings)[1].config, self.cut(placement)
            found = []
            for index in set(cut.of_rank[rank]):
                form = (of_all, cut.forms[index])
                if form not in self._kept:
                    needed = stage_bytes(config, cut.spans[index], self._blocks.setdefault(of_all, {}))
                    self._kept[form] = needed.kept, needed.backward
                found.append(self._kept[form])
            self._kept[key] = min(kept for kept, _ in found), min(most for _, most in found)
        return self._kept[key]

    def _held_bytes(self, layout: Layout, settings: Settings, placement: tuple[int, ...], rank: int) -> int:
        """Return a lower bound of the bytes that a rank holds through a step."""
        key = (layout, settings.zero_stage, placement, rank)
        if key not in self._bytes:
            training, config = self._base.training, self._stage_times(layout, settings)[1].config
            counts = self._rank_parameters(layout, config, placement, rank)
            if self._base.model.tied_embeddings and {placement[0], placement[-1]} == {rank} and len(placement) > 1:
                counts += ParameterCounts(
                    others=-vocabulary_elements(self._base.model, layout.tp)
                )  # one table for both
            placements = ZERO_STAGES[settings.zero_stage]
            replicas, of_experts = config.replica_counts(layout.dp)
            share, of_expert = (replicas, of_experts) if placements.state else (1, 1)
            matrices = counts.matrices // share + counts.expert_matrices // of_expert
            others = counts.others // share + counts.expert_others // of_expert
            own = matrices + others
            held = training.element_bytes * (own if placements.weights else counts.total)
            held += 4 * (own if placements.gradients else counts.total)
            optimizer = optimizer_bytes(self._base.optimizer, training.weight_dtype, matrices, others)
            if self._cluster.device == "cuda":
                communicators = communicator_bytes(self._parallel(layout, settings))
                held += CONTEXT_BYTES + communicators + int(SCATTERED * optimizer)
            self._bytes[key] = held + optimizer
        return self._bytes[key]

    def _parallel(self, layout: Layout, settings: Settings) -> ParallelConfig:
        """Return what the times of reduction, update and messages depend on, and the communicators."""
        key = (layout, settings.zero_stage)
        if key not in self._parallels:
            self._parallels[key] = ParallelConfig(
                tensor_parallel_size=layout.tp,
                pipeline_parallel_size=layout.pp,
                context_parallel_size=layout.cp,
                data_parallel_size=layout.dp,
                expert_parallel_size=layout.ep,
                expert_tensor_parallel_size=layout.etp,
                zero_stage=settings.zero_stage,
            )
        return self._parallels[key]

    def _rank_parameters(
        self, layout: Layout, config: TrainConfig, placement: tuple[int, ...], rank: int
    ) -> ParameterCounts:
        key = (layout.tp, layout.ep, layout.etp, placement, rank)
        if key not in self._of_rank:
            cut, counts = self.cut(placement), ParameterCounts()
            for index in cut.of_rank[rank]:
                form = (layout.tp, layout.ep, layout.etp, cut.forms[index])
                if form not in self._parameters:
                    self._parameters[form] = stage_parameters(config.model, cut.spans[index], config.parallel)
                counts += self._parameters[form]
            self._of_rank[key] = counts
        return self._of_rank[key]

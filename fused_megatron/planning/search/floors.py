"""Lower bounds of the time and the memory of a layout, without building its schedule for the whole step."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby, pairwise
from operator import add, mul
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
from fused_megatron.planning.search.pipeline_bounds import (
    Pipeline,
    Units,
    fastest,
    least_seconds,
    units_of,
    units_of_ranks,
)
from fused_megatron.planning.search.pipelines import pipelines
from fused_megatron.planning.search.recomputations import least_recomputed
from fused_megatron.planning.working_memory import BlockKind, BlocksOfConfig, kinds_of_blocks

_ROUNDING = 1 - 1e-9
"""Sums in another order differ by rounding; a bound must not exceed the prediction."""

Key = tuple[Any, ...]
"""Key of a dictionary: what its values depend on."""


class StageForm(NamedTuple):
    """Stages of one form need the same time and memory: their blocks, and whether they have the embedding or the head.

    Attributes:
        key: number of the form, for dictionaries.
        blocks: for each block, whether it has experts.
        span: a stage of this form.
    """

    key: int
    blocks: tuple[bool, ...]
    span: StageSpan


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
        key: of the placement, for dictionaries: tuples of ranks take long to hash.
        placement: rank of each stage.
        forms: the forms, in the order in which they appear.
        number: stages of each form.
        of_rank: indices of the forms of each rank's stages.
        shares: the first and the last rank, and of each group of ranks with the same forms the one that starts last.
        hops: messages between ranks on the way from the first to the last stage.
    """

    key: int
    placement: tuple[int, ...]
    forms: tuple[StageForm, ...]
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


def _cut(model: TransformerConfig, placement: tuple[int, ...], key: int, known: dict[Key, StageForm]) -> Cut:
    forms: dict[int, StageForm] = {}
    spans, of_stage = cut_stages(model, len(placement), placement=placement), []
    for span in spans:
        blocks = tuple(model.has_experts(block) for block in range(span.start, span.stop))
        form = known.setdefault((blocks, span.first, span.last), StageForm(len(known), blocks, span))
        forms[form.key] = form
        of_stage.append(list(forms).index(form.key))

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
    number, of_shares = numbers(of_stage), tuple(shares.values())
    return Cut(key, placement, tuple(forms.values()), number, tuple(of_rank), of_shares, hops)


def _dot(numbers: Sequence[int], values: Sequence[float]) -> float:
    return sum(map(mul, numbers, values))


@lru_cache(maxsize=64)
def splits_backward(schedule: str, stages_per_rank: int) -> bool:
    """Return whether the schedule has W actions, which may run after the last I of a rank."""
    actions = build_schedule(schedule, 2, 4, stages_per_rank).actions
    return any(action.kind == Kind.WEIGHT_GRAD for rank in actions for action in rank)


def _ends(layout: Layout) -> tuple[int, ...]:
    """Return the first and the last pipeline rank."""
    return (0, layout.pp - 1) if layout.pp > 1 else (0,)


def _shape(layout: Layout, settings: Settings) -> Key:
    """Return the sizes that decide the work and the activations of a block, beside its recomputation."""
    return layout.tp, layout.cp, layout.ep, layout.etp, settings.microbatch_size, settings.sequence_parallel


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
        self._cut_of: dict[tuple[str, int, int], Cut] = {}
        self._forms: dict[Key, StageForm] = {}
        self._configs: dict[Key, TrainConfig] = {}
        self._models: dict[Key, TransformerConfig] = {}
        self._times: dict[Key, StageTimes] = {}
        self._works: dict[Key, dict[tuple[bool, str], tuple[Work, Work, Work]]] = {}
        self._units: dict[tuple[Key, str], Units] = {}
        self._bounded: dict[Key, list[Pipeline]] = {}
        self._end_times: dict[Key, list[float]] = {}
        self._seconds: dict[Key, tuple[float, float, float]] = {}
        self._form_costs: dict[Key, FormCosts] = {}
        self._floors: dict[Key, float] = {}
        self._bytes: dict[Key, tuple[int, ...]] = {}
        self._needed: dict[Key, tuple[int, ...]] = {}
        self._kept: dict[Key, tuple[BlocksOfConfig, dict[Key, tuple[int, int]]]] = {}
        self._runs: dict[Key, list[tuple[BlockKind, int]]] = {}
        self._parameters: dict[Key, ParameterCounts] = {}
        self._of_rank: dict[Key, ParameterCounts] = {}
        self._replicas: dict[Layout, tuple[int, int]] = {}
        self._parallels: dict[tuple[Layout, int], ParallelConfig] = {}

    def seconds(self, layout: Layout, settings: Settings, *, of_actions: bool = False) -> float:
        """Return a lower bound of the seconds of a step; of_actions: a lower and quicker one.

        A rank starts when a microbatch has passed all stages before its first one. Then it does its own work. If its
        last action is a whole backward, the stages before its first one still follow. The rank of the first stage ends
        last then; the reduction of its gradients and the update follow. This rank also waits for the microbatches that
        the last stage passes back to it, one after the other.

        Args:
            layout, settings: of the run.
            of_actions: leave out what every microbatch sends to replicas.
        """
        key = layout, settings, of_actions
        if key not in self._floors:
            self._floors[key] = self._least_seconds(layout, settings, of_actions)
        return self._floors[key]

    def seconds_of_actions(self, layout: Layout, settings: Settings) -> float:
        """Return a lower bound of `seconds` for all ZeRO stages: nothing is sent to replicas, and nothing updated."""
        settings = settings._replace(zero_stage=0)
        key = layout, settings, "actions"
        if key not in self._floors:
            self._floors[key] = _ROUNDING * (max(self._ends(layout, settings)) + 1e-3 * self._cluster.step_ms)
        return self._floors[key]

    def _least_seconds(self, layout: Layout, settings: Settings, of_actions: bool) -> float:
        cut, parallel = self._pipeline(layout, settings), self._parallel(layout, settings.zero_stage)
        actions = settings._replace(zero_stage=0) if of_actions else settings
        costs = self._costs(layout, actions, cut)
        *ends, latest = self._ends(layout, actions)
        longest, updated = max(ends), 0.0
        for share, end in zip(cut.shares, ends, strict=True):
            if share.rank in (0, layout.pp - 1):
                parameters = self._rank_parameters(layout, cut, share.rank).total
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
        cut = self._pipeline(layout, settings)
        costs, config = self._costs(layout, settings, cut), self._stage_times(layout, settings)[1].config
        number, parallel = self.num_microbatches(layout, settings), self._parallel(layout, settings.zero_stage)
        sent = message_s(self._cluster, self._engine, parallel, message_bytes(config)) if layout.pp > 1 else 0.0
        splits = splits_backward(settings.schedule, settings.stages_per_rank)
        ends, latest = [], 0.0
        for share in cut.shares:
            end = number * _dot(share.own, costs.wholes) + _dot(share.before, costs.forwards) + share.hops * sent
            ends.append(end)
            latest = max(latest, end + _dot(share.before, costs.backwards) + share.hops * sent)
        first, last = cut.of_rank[0][0], cut.of_rank[cut.placement[-1]][-1]
        passed = _dot(cut.number, costs.wholes) + (number - 1) * costs.wholes[last] + 2 * cut.hops * sent
        if splits:  # W of the first stage follows its last I; every other W can wait
            passed -= _dot(cut.number, costs.weight_grads) - costs.weight_grads[first]
            passed -= (number - 1) * costs.weight_grads[last]
        return [*ends, max(ends[0] if splits else latest, passed)]

    def least_seconds(
        self, layout: Layout, microbatch_size: int, sequence_parallel: bool, recompute: str = "none"
    ) -> float:
        """Return a lower bound of `seconds` for all settings with this size of microbatches.

        Args:
            layout: of the axes.
            microbatch_size, sequence_parallel: of the settings.
            recompute: what is recomputed at least: "none", "selective", or "full": some whole blocks.
        """
        settings = Settings(microbatch_size, sequence_parallel, "1f1b", 1)
        key, times = self._stage_times(layout, settings)
        if (key, recompute) not in self._units:
            self._units[key, recompute] = units_of(self._base.model, times, recompute)
        found = least_seconds(
            self._pipelines(layout.pp, recompute == "full"),
            self._units[key, recompute],
            self.num_microbatches(layout, settings),
            add if self._cluster.device == "cpu" else max,
        )
        return _ROUNDING * (found + 1e-3 * self._cluster.step_ms)

    def _pipelines(self, num_ranks: int, recomputes: bool) -> list[Pipeline]:
        """Return the pipelines that are searched, with the least number of whole blocks that they can recompute."""
        key = (num_ranks, recomputes)
        if key not in self._bounded:
            model = self._base.model
            self._bounded[key] = fastest(
                [
                    Pipeline(
                        units_of_ranks(
                            model,
                            placement_of(name, num_ranks, per_rank),
                            least_recomputed(model.num_layers // num_ranks // per_rank) if recomputes else 0,
                        ),
                        splits_backward(name, per_rank),
                    )
                    for name, per_rank in pipelines(num_ranks, model.num_layers)
                ]
            )
        return self._bounded[key]

    def memory(self, layout: Layout, settings: Settings) -> int:
        """Return a lower bound of the bytes of the rank that needs most."""
        cut, number = self._pipeline(layout, settings), min(self.num_microbatches(layout, settings), 2 * layout.pp)
        key = (layout.tp, layout.cp, layout.ep, layout.etp, *settings[:6], layout.pp, number)
        if key not in self._needed:
            live = live_activations(settings.schedule, layout.pp, settings.stages_per_rank, number)
            self._needed[key] = self._needed_bytes(layout, settings, cut, live)
        held = self._held_bytes(layout, settings.zero_stage, cut)
        return max(map(add, self._needed[key], held))

    def least_memory(self, layout: Layout) -> int:
        """Return a lower bound of `memory` for all settings: one activation of a stage is held."""
        shards, zero = sequence_choices(self._base, layout)[-1], self.zero_stages(layout)[-1]
        one, found = [1] * layout.pp, []
        for name, per_rank in pipelines(layout.pp, self._base.model.num_layers):
            settings = Settings(1, shards, name, per_rank, "full", None, zero)
            cut = self._pipeline(layout, settings)
            needed = self._needed_bytes(layout, settings, cut, one)
            found.append(max(map(add, needed, self._held_bytes(layout, zero, cut))))
        return min(found)

    def fullest_ranks(self, layout: Layout, settings: Settings) -> list[int]:
        """Return pipeline ranks of which one needs most memory.

        Of ranks whose stages have the same forms the first one holds most microbatches, if stages go round the ranks.
        """
        if SCHEDULES[settings.schedule].placement == "v":
            return list(range(layout.pp))
        first: dict[tuple[int, ...], int] = {}
        for rank, forms in enumerate(self._pipeline(layout, settings).of_rank):
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

    def _costs(self, layout: Layout, settings: Settings, cut: Cut) -> FormCosts:
        """Return the seconds of a microbatch in a stage of each form."""
        key, times = self._stage_times(layout, settings)
        if (key, cut.key) not in self._form_costs:
            found = []
            for form in cut.forms:
                if (known := self._seconds.get((key, form.key))) is None:
                    known = self._seconds[key, form.key] = times.seconds_of_stage(form.span)
                found.append(known)
            forwards, backwards, weight_grads = zip(*found, strict=True)
            wholes = tuple(map(sum, zip(forwards, backwards, strict=True)))
            self._form_costs[key, cut.key] = FormCosts(forwards, backwards, weight_grads, wholes)
        return self._form_costs[key, cut.key]

    def _stage_times(self, layout: Layout, settings: Settings) -> tuple[Key, StageTimes]:
        placements = ZERO_STAGES[settings.zero_stage]
        gathers = (layout.dp, placements.weights) if placements.gradients else ()
        key = (_shape(layout, settings), gathers, layout.pp > 1, settings.recompute, settings.recompute_blocks)
        if key not in self._times:
            shared = self._works.setdefault(key[0], {})
            self._times[key] = StageTimes(self._config(layout, settings), self._cluster, self._engine, shared)
        return key, self._times[key]

    def _config(self, layout: Layout, settings: Settings) -> TrainConfig:
        """Return the config of settings. Its checks take long: configs that differ in recomputation share most."""
        placements = ZERO_STAGES[settings.zero_stage]
        key = (_shape(layout, settings), layout.dp, layout.pp, placements)
        if key not in self._configs:
            self._configs[key] = train_config(self._base, layout, settings)
        return replace(self._configs[key], model=self._model(settings))

    def _model(self, settings: Settings) -> TransformerConfig:
        key = (settings.recompute, settings.recompute_blocks)
        if key not in self._models:
            self._models[key] = replace(self._base.model, recompute=key[0], recompute_blocks=key[1])
        return self._models[key]

    def _pipeline(self, layout: Layout, settings: Settings) -> Cut:
        """Return the stages of a pipeline by their form."""
        key = (settings.schedule, layout.pp, settings.stages_per_rank)
        if key not in self._cut_of:
            placement = placement_of(*key)
            if placement not in self._cuts:
                self._cuts[placement] = _cut(self._base.model, placement, len(self._cuts), self._forms)
            self._cut_of[key] = self._cuts[placement]
        return self._cut_of[key]

    def _needed_bytes(self, layout: Layout, settings: Settings, cut: Cut, live: Sequence[int]) -> tuple[int, ...]:
        """Return lower bounds of the bytes of activations of the first and the last rank.

        The most activations are held when a backward begins, which then needs its own bytes.
        """
        shape = (_shape(layout, settings), settings.recompute)
        if shape not in self._kept:
            self._kept[shape] = BlocksOfConfig(self._config(layout, settings)), {}
        found = []
        for rank in _ends(layout):
            stages = [
                self._stage_bytes(settings, cut.forms[index], *self._kept[shape]) for index in set(cut.of_rank[rank])
            ]
            needed = (live[rank] - 1) * min(kept for kept, _ in stages) + min(most for _, most in stages)
            found.append(needed + (int(SCATTERED * needed) if self._cluster.device == "cuda" else 0))
        return tuple(found)

    def _stage_bytes(
        self, settings: Settings, form: StageForm, blocks: BlocksOfConfig, known: dict[Key, tuple[int, int]]
    ) -> tuple[int, int]:
        """Return the bytes that a stage keeps for a microbatch, and that its backward needs."""
        model = self._model(settings)
        key = (form.key, model.recomputed_blocks(len(form.blocks)))
        if key not in known:
            if key not in self._runs:
                kinds = kinds_of_blocks(model, form.blocks)
                self._runs[key] = [(kind, len(list(members))) for kind, members in groupby(kinds)]
            known[key] = blocks.kept_and_backward(self._runs[key], form.span.first, form.span.last)
        return known[key]

    def _held_bytes(self, layout: Layout, zero_stage: int, cut: Cut) -> tuple[int, ...]:
        """Return lower bounds of the bytes that the first and the last rank hold through a step."""
        key = (layout, zero_stage, cut.key)
        if key not in self._bytes:
            self._bytes[key] = tuple(self._held_by(layout, zero_stage, cut, rank) for rank in _ends(layout))
        return self._bytes[key]

    def _held_by(self, layout: Layout, zero_stage: int, cut: Cut, rank: int) -> int:
        training, counts = self._base.training, self._rank_parameters(layout, cut, rank)
        has_both_ends = {cut.placement[0], cut.placement[-1]} == {rank} and len(cut.placement) > 1
        if self._base.model.tied_embeddings and has_both_ends:
            counts += ParameterCounts(others=-vocabulary_elements(self._base.model, layout.tp))  # one table for both
        if layout not in self._replicas:
            config = train_config(self._base, layout, Settings(1, False, "1f1b", 1))
            self._replicas[layout] = config.replica_counts(layout.dp)
        placements, (replicas, of_experts) = ZERO_STAGES[zero_stage], self._replicas[layout]
        share, of_expert = (replicas, of_experts) if placements.state else (1, 1)
        matrices = counts.matrices // share + counts.expert_matrices // of_expert
        others = counts.others // share + counts.expert_others // of_expert
        own = matrices + others
        held = training.element_bytes * (own if placements.weights else counts.total)
        held += 4 * (own if placements.gradients else counts.total)
        optimizer = optimizer_bytes(self._base.optimizer, training.weight_dtype, matrices, others)
        if self._cluster.device == "cuda":
            held += CONTEXT_BYTES + communicator_bytes(self._parallel(layout, zero_stage)) + int(SCATTERED * optimizer)
        return held + optimizer

    def _parallel(self, layout: Layout, zero_stage: int) -> ParallelConfig:
        """Return what the times of reduction, update and messages depend on, and the communicators."""
        key = (layout, zero_stage)
        if key not in self._parallels:
            self._parallels[key] = ParallelConfig(
                tensor_parallel_size=layout.tp,
                pipeline_parallel_size=layout.pp,
                context_parallel_size=layout.cp,
                data_parallel_size=layout.dp,
                expert_parallel_size=layout.ep,
                expert_tensor_parallel_size=layout.etp,
                zero_stage=zero_stage,
            )
        return self._parallels[key]

    def _rank_parameters(self, layout: Layout, cut: Cut, rank: int) -> ParameterCounts:
        key = (layout.tp, layout.ep, layout.etp, cut.key, rank)
        if key not in self._of_rank:
            parallel, counts = self._parallel(layout, 0), ParameterCounts()
            for index in cut.of_rank[rank]:
                form = cut.forms[index]
                of_form = (layout.tp, layout.ep, layout.etp, form.key)
                if of_form not in self._parameters:
                    self._parameters[of_form] = stage_parameters(self._base.model, form.span, parallel)
                counts += self._parameters[of_form]
            self._of_rank[key] = counts
        return self._of_rank[key]

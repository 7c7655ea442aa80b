"""Lower bounds of the time and the memory of a layout, without building its schedule for the whole step."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from fused_megatron.config import ParallelConfig, TrainConfig
from fused_megatron.data_parallel.placement import ZERO_STAGES
from fused_megatron.models import StageSpan, cut_stages
from fused_megatron.pipeline.schedule.action import Kind, loop_placement, stages_of, v_placement
from fused_megatron.pipeline.schedule.schedules import SCHEDULES, build_schedule
from fused_megatron.planning.engine_memory import CONTEXT_BYTES
from fused_megatron.planning.optimizer_memory import optimizer_bytes
from fused_megatron.planning.parameter_counts import ParameterCounts, stage_parameters, vocabulary_elements
from fused_megatron.planning.prediction.block_time import StageTimes
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.prediction.end_of_step import message_s, reduction_s, update_s
from fused_megatron.planning.prediction.engine import OWN, engine_of
from fused_megatron.planning.prediction.shared_cores import of_one_rank
from fused_megatron.planning.rank_communication import message_bytes
from fused_megatron.planning.search.layouts import Layout, Settings, sequence_choices, train_config
from fused_megatron.planning.search.pipelines import pipelines
from fused_megatron.planning.working_memory import stage_bytes

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
        self._spans: dict[tuple[int, ...], tuple[StageSpan, ...]] = {}
        self._forms: dict[tuple[int, ...], tuple[Form, ...]] = {}
        self._times: dict[Form, StageTimes] = {}
        self._seconds: dict[Form, tuple[float, float, float]] = {}
        self._kept: dict[Form, tuple[int, int]] = {}
        self._parameters: dict[Form, ParameterCounts] = {}
        self._of_rank: dict[Form, ParameterCounts] = {}
        self._parallels: dict[tuple[Layout, int], ParallelConfig] = {}

    def seconds(self, layout: Layout, settings: Settings) -> float:
        """Return a lower bound of the seconds of a step.

        A rank starts when a microbatch has passed all stages before its first one. Then it does its own work. If its
        last action is a whole backward, the stages before its first one still follow. The rank of the first stage ends
        last then; the reduction of its gradients and the update follow.
        """
        placement = placement_of(settings.schedule, layout.pp, settings.stages_per_rank)
        parallel = self._parallel(layout, settings)
        costs, times = self._costs(layout, settings, placement), self._stage_times(layout, settings)[1]
        number = self.num_microbatches(layout, settings)
        sent = message_s(self._cluster, self._engine, parallel, message_bytes(times.config))
        has_tail = not splits_backward(settings.schedule, settings.stages_per_rank)
        busy, backwards = [0.0] * layout.pp, [0.0] * layout.pp
        head: dict[int, float] = {}
        tail: dict[int, float] = {}
        ahead = behind = 0.0
        for stage, (rank, (forward, inputs, weights)) in enumerate(zip(placement, costs, strict=True)):
            hop = sent if stage and placement[stage - 1] != rank else 0.0
            ahead += hop
            behind += hop
            head.setdefault(rank, ahead)
            tail.setdefault(rank, behind)
            ahead += forward
            behind += inputs + weights
            busy[rank] += forward + inputs + weights
            backwards[rank] += inputs + weights
        ends = [number * busy[rank] + head[rank] for rank in range(layout.pp)]
        reduced, updated = {}, 0.0
        for rank in {0, layout.pp - 1}:
            parameters = self._rank_parameters(layout, times.config, placement, rank).total
            size = self._base.training.element_bytes
            reduced[rank] = reduction_s(self._cluster, self._engine, parallel, size, parameters, backwards[rank])
            spans = [self.spans(placement)[stage] for stage in stages_of(placement, rank)]
            blocks = sum(span.stop - span.start for span in spans)
            updated = max(updated, update_s(self._cluster, self._engine, parallel, parameters, blocks))
        longest = max(*ends, *(ends[rank] + reduced[rank] for rank in reduced))
        if has_tail:
            longest = max(longest, max(ends[rank] + tail[rank] for rank in head) + reduced[0])
        return _ROUNDING * (longest + updated + 1e-3 * self._cluster.step_ms)

    def least_seconds(self, layout: Layout, microbatch_size: int, sequence_parallel: bool) -> float:
        """Return a lower bound of `seconds` for all settings with this size of microbatches."""
        settings = Settings(microbatch_size, sequence_parallel, "1f1b", 1)
        costs = self._costs(layout, settings, tuple(range(layout.pp)))
        number = self.num_microbatches(layout, settings)
        return _ROUNDING * number * sum(map(sum, costs)) / layout.pp

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
        self.spans(placement)
        forms = self._forms[placement]
        first: dict[Form, int] = {}
        for rank in range(layout.pp):
            first.setdefault(tuple(forms[stage] for stage in stages_of(placement, rank)), rank)
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

    def _costs(self, layout: Layout, settings: Settings, placement: Sequence[int]) -> list[tuple[float, float, float]]:
        """Return (F, I, W) seconds of each stage for a microbatch."""
        key, times = self._stage_times(layout, settings)
        found = []
        for span, form in zip(self.spans(placement), self._forms[tuple(placement)], strict=True):
            if (known := self._seconds.get((key, form))) is None:
                known = self._seconds[key, form] = times.of_stage(span).seconds(self._cluster.device)
            found.append(known)
        return found

    def _stage_times(self, layout: Layout, settings: Settings) -> tuple[Form, StageTimes]:
        placements = ZERO_STAGES[settings.zero_stage]
        gathers = (layout.dp, placements.weights) if placements.gradients else ()
        key = (
            (layout.tp, layout.cp, layout.ep, layout.etp, gathers),
            (settings.microbatch_size, settings.sequence_parallel, settings.recompute, settings.recompute_blocks),
        )
        if key not in self._times:
            self._times[key] = StageTimes(train_config(self._base, layout, settings), self._cluster, self._engine)
        return key, self._times[key]

    def spans(self, placement: Sequence[int]) -> tuple[StageSpan, ...]:
        """Return the blocks of each stage."""
        placement = tuple(placement)
        if placement not in self._spans:
            model = self._base.model
            spans = cut_stages(model, len(placement), placement=placement)
            self._spans[placement] = spans
            self._forms[placement] = tuple(
                (tuple(model.has_experts(block) for block in range(span.start, span.stop)), span.first, span.last)
                for span in spans
            )
        return self._spans[placement]

    def _rank_bytes(
        self, layout: Layout, settings: Settings, placement: Sequence[int], rank: int, num_live: int
    ) -> int:
        training = self._base.training
        config = self._stage_times(layout, settings)[1].config
        counts = self._rank_parameters(layout, config, placement, rank)
        bytes_of = [self._stage_bytes(layout, settings, placement, stage) for stage in stages_of(placement, rank)]
        kept, in_backward = (min(each) for each in zip(*bytes_of, strict=True))
        if self._base.model.tied_embeddings and {placement[0], placement[-1]} == {rank} and len(placement) > 1:
            counts += ParameterCounts(others=-vocabulary_elements(self._base.model, layout.tp))  # one table for both
        placements = ZERO_STAGES[settings.zero_stage]
        replicas, of_experts = config.replica_counts(layout.dp)
        share, of_expert = (replicas, of_experts) if placements.state else (1, 1)
        matrices = counts.matrices // share + counts.expert_matrices // of_expert
        others = counts.others // share + counts.expert_others // of_expert
        own = matrices + others
        held = training.element_bytes * (own if placements.weights else counts.total)
        held += 4 * (own if placements.gradients else counts.total)
        held += optimizer_bytes(self._base.optimizer, training.dtype, matrices, others)
        held += CONTEXT_BYTES if self._cluster.device == "cuda" else 0
        # The most activations are held when a backward begins, which then needs its own bytes.
        return held + (num_live - 1) * kept + in_backward

    def _parallel(self, layout: Layout, settings: Settings) -> ParallelConfig:
        """Return what the times of reduction, update and messages depend on."""
        key = (layout, settings.zero_stage)
        if key not in self._parallels:
            self._parallels[key] = ParallelConfig(
                tensor_parallel_size=layout.tp,
                pipeline_parallel_size=layout.pp,
                context_parallel_size=layout.cp,
                data_parallel_size=layout.dp,
                zero_stage=settings.zero_stage,
            )
        return self._parallels[key]

    def _rank_parameters(
        self, layout: Layout, config: TrainConfig, placement: Sequence[int], rank: int
    ) -> ParameterCounts:
        key = (layout.tp, layout.ep, layout.etp, tuple(placement), rank)
        if key not in self._of_rank:
            self.spans(placement)
            counts = ParameterCounts()
            for stage in stages_of(placement, rank):
                counts += self._stage_parameters(layout, config, placement, stage)
            self._of_rank[key] = counts
        return self._of_rank[key]

    def _stage_parameters(
        self, layout: Layout, config: TrainConfig, placement: Sequence[int], stage: int
    ) -> ParameterCounts:
        key = (layout.tp, layout.ep, layout.etp, self._forms[tuple(placement)][stage])
        if key not in self._parameters:
            self._parameters[key] = stage_parameters(config.model, self.spans(placement)[stage], config.parallel)
        return self._parameters[key]

    def _stage_bytes(self, layout: Layout, settings: Settings, placement: Sequence[int], stage: int) -> tuple[int, int]:
        """Return the bytes that a stage keeps for a microbatch, and the most bytes inside its backward."""
        key, times = self._stage_times(layout, settings)
        span = self.spans(placement)[stage]
        form = (key, self._forms[tuple(placement)][stage])
        if form not in self._kept:
            found = stage_bytes(times.config, span)
            self._kept[form] = found.kept, found.backward
        return self._kept[form]

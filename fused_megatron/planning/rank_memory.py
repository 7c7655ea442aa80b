"""Formulas for the memory that a rank needs in training: weights, gradients, optimizer state, activations."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import gcd

from fused_megatron.assembly.pipeline_plan import PipelinePlan, plan_pipeline, stage_spans
from fused_megatron.config import TrainConfig
from fused_megatron.data_parallel.fixed_sizes import BYTES_PER_ELEMENT
from fused_megatron.data_parallel.placement import ZERO_STAGES, Placements, zero_stage
from fused_megatron.models import StageSpan
from fused_megatron.pipeline.schedule.action import ENDS_OF_BACKWARD, Kind, stages_of
from fused_megatron.planning.block_backward import NOTHING
from fused_megatron.planning.bucket_memory import TABLE, Made, Sending, UnderWay, send_buckets
from fused_megatron.planning.optimizer_memory import optimizer_bytes, update_bytes
from fused_megatron.planning.parameter_counts import (
    ParameterCounts,
    block_parameters,
    stage_parameters,
    vocabulary_elements,
)
from fused_megatron.planning.rank_communication import message_bytes
from fused_megatron.planning.schedule_moments import (
    Moment,
    needs_no_more_than_the_rank_before,
    rank_moments,
)
from fused_megatron.planning.working_memory import StageBytes, stage_bytes

StageFormula = Callable[[TrainConfig, StageSpan], StageBytes]
"""Computes what the activations of a stage need."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes that a rank holds at the peak of a step.

    Attributes:
        num_parameters: parameters of this rank (a number, not bytes).
        weights: 4 bytes a parameter in float32, 2 in bfloat16; with zero_stage=3 only for this rank's share. With an
            asynchronous schedule as much for each older version.
        gradients: 4 bytes a parameter (float32); with zero_stage=2 or 3 only for this rank's share.
        optimizer: AdamW has 8 bytes a parameter for float32 moments; 12 in bfloat16, which also has float32 main
            weights (other kinds: optimizer_memory.py). With ZeRO only this rank's share of the parameters counts,
            without the rounding up to whole rows.
        activations: activations that forward keeps for backward, of all microbatches in flight.
        working: estimate of temporary tensors: the larger of what a block or the head computes with, and what the
            reduction of gradients or the update needs beyond the memory of the activations. Sharded gradients add a
            bucket. Sharded weights add one whole unit and one that is being received, or all weights.
    """

    num_parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def rank_memory(
    config: TrainConfig,
    pp_rank: int | Collection[int] | None = None,
    data_parallel_size: int | None = None,
    of_stage: StageFormula = stage_bytes,
    device: str = "cpu",
) -> RankMemory:
    """Compute the memory of one pipeline rank, or of the rank that needs most.

    Args:
        config: model.vocab_size must be given.
        pp_rank: pipeline rank; several: the rank of these that needs most; None: the rank that needs most.
        data_parallel_size: used if the config has none; None: 1.
        of_stage: formula of the activations of a stage; the default is of our own layers.
        device: type of the ranks' device. Gloo, on a CPU, needs more memory than NCCL to sum gradients.

    Raises:
        InputError: as plan_pipeline and cut_stages; vocab_size is None.
    """
    parallel = config.parallel
    formulas = _Formulas(config, parallel.data_parallel_size or data_parallel_size or 1, of_stage, device)
    if isinstance(pp_rank, int):
        return formulas.of_rank(pp_rank)
    ranks = pp_rank or [rank for rank in range(parallel.pipeline_parallel_size) if not formulas.is_covered(rank)]
    return max((formulas.of_rank(rank) for rank in ranks), key=lambda memory: memory.total)


class _Formulas:
    """Formulas of the ranks of one config; stages of the same form share their numbers."""

    def __init__(self, config: TrainConfig, dp_size: int, of_stage: StageFormula, device: str) -> None:
        self._config, self._of_stage = config, of_stage
        self._plan: PipelinePlan = plan_pipeline(config, asynchronous=True)
        self._spans = stage_spans(config, self._plan)
        training = config.training
        self._num_microbatches = training.global_batch_size // training.microbatch_size // dp_size
        self._versions = self._plan.weight_versions()
        self._placements, self._shards, self._expert_shards = _sharding(config, dp_size)
        least = round(training.bucket_bytes(config.replica_counts(config.parallel.data_parallel_size or 1)[0]))
        self._sending = Sending(
            least, self._shards, self._expert_shards, self._placements.gradients, receives=device == "cpu"
        )
        self._gathers_blocks = self._placements.weights and config.parallel.zero_gather == "block"
        self._splits = Kind.INPUT_GRAD in {
            moment.kind for moment in rank_moments(self._plan, self._num_microbatches, 0)
        }
        self._stages: dict[object, tuple[ParameterCounts, StageBytes]] = {}

    def of_rank(self, rank: int) -> RankMemory:
        """Return the memory of a pipeline rank."""
        config, placements = self._config, self._placements
        size = config.training.element_bytes
        stages = stages_of(self._plan.placement, rank)
        spans = [self._spans[stage] for stage in stages]
        found = [self._stage(span) for span in spans]
        counts = sum((each for each, _ in found), ParameterCounts())
        if self._shares_table(spans):
            table = vocabulary_elements(config.model, config.parallel.tensor_parallel_size)
            counts += ParameterCounts(others=-table)
        own_matrices = -(-counts.matrices // self._shards) + -(-counts.expert_matrices // self._expert_shards)
        own_others = -(-counts.others // self._shards) + -(-counts.expert_others // self._expert_shards)
        own = own_matrices + own_others
        activations, working = self._peak(rank, spans, counts)
        updating = update_bytes(config.optimizer, config.training.weight_dtype, config.model, own)
        return RankMemory(
            counts.total,
            weights=size * self._versions[rank] * (own if placements.weights else counts.total),
            gradients=BYTES_PER_ELEMENT * (own if placements.gradients else counts.total),
            optimizer=optimizer_bytes(config.optimizer, config.training.weight_dtype, own_matrices, own_others),
            activations=activations,
            working=max(working, updating - activations),
        )

    def is_covered(self, rank: int) -> bool:
        """Return whether the rank before has stages of the same form and holds at least as many microbatches."""
        if rank == 0 or self._forms(rank) != self._forms(rank - 1):
            return False
        return needs_no_more_than_the_rank_before(self._plan, self._num_microbatches, rank)

    def _forms(self, rank: int) -> list[tuple[bool, ...]]:
        return [self._form(self._spans[stage]) for stage in stages_of(self._plan.placement, rank)]

    def _form(self, span: StageSpan) -> tuple[bool, ...]:
        """Return what decides the memory of a stage: its ends, and which of its blocks have experts."""
        has_experts = self._config.model.has_experts
        return span.first, span.last, *(has_experts(block) for block in range(span.start, span.stop))

    def _stage(self, span: StageSpan) -> tuple[ParameterCounts, StageBytes]:
        """Return the parameters and the activations of a stage."""
        config = self._config
        form = self._form(span)
        if form not in self._stages:
            self._stages[form] = (
                stage_parameters(config.model, span, config.parallel),
                self._of_stage(config, span),
            )
        return self._stages[form]

    def _peak(self, rank: int, spans: Sequence[StageSpan], counts: ParameterCounts) -> tuple[int, int]:
        """Return the most bytes of activations, and what the moment that needs most has beyond them."""
        config = self._config
        size = config.training.element_bytes
        needs = [self._stage(span)[1] for span in spans]
        by_step = self._placements.weights and config.parallel.zero_gather != "block"
        always = size * counts.total if by_step else 0
        activations = most = 0
        for moment in rank_moments(self._plan, self._num_microbatches, rank):
            need = needs[moment.stage]
            held = _held(moment, needs)
            own = need.deferred if moment.kind == Kind.WEIGHT_GRAD else need.kept
            activations = max(activations, held + own)
            message = message_bytes(config) if moment.posted else 0
            most = max(most, held + always + message + self._at(moment, spans, need))
        return activations, most - activations

    def _at(self, moment: Moment, spans: Sequence[StageSpan], need: StageBytes) -> int:
        """Return the most bytes in an action, of its microbatch and of buckets that the rank sends or has sent."""
        sending = self._sending
        if not sending.copies:
            return need.peak(moment.kind)
        peak = self._with_gathered(need, moment.kind, spans[moment.stage])
        shares_table = self._shares_table(spans)
        backwards = moment.ended if sending.sharded else tuple(map(int, moment.complete))
        under_way = [self._under_way(span, number, shares_table) for span, number in zip(spans, backwards, strict=True)]
        waiting = sum(map(sum, under_way))
        if shares_table:
            waiting += self._shared_table(min(backwards))
        if moment.kind not in ENDS_OF_BACKWARD or not (moment.last or sending.sharded):
            return peak + waiting
        own = under_way[moment.stage]
        sent = send_buckets(self._made(need, shares_table), sending, own, early=not self._splits)
        if moment.kind == Kind.WEIGHT_GRAD:
            most = max(peak + sum(own), sent.at_moments[-1], sent.most_after)
        else:
            size = self._config.training.element_bytes if self._gathers_blocks else 0
            at_moments = zip(need.moments, sent.at_moments, strict=True)
            needed = [moment.num_bytes + size * moment.gathered + buckets for moment, buckets in at_moments]
            whole = size * need.moments[-1].gathered * (not self._splits)  # the last bucket leaves in the backward
            most = max(sent.most_after + whole, *needed)
        return most + waiting - sum(own)

    def _with_gathered(self, need: StageBytes, kind: Kind, span: StageSpan) -> int:
        """Return the most bytes in an action, with the weights that ZeRO has gathered block by block."""
        if not self._gathers_blocks:
            return need.peak(kind)
        if kind == Kind.FORWARD and need.forward_by_block:
            return need.forward_by_block
        return need.peak(kind) + 2 * self._config.training.element_bytes * _largest_unit(self._config, span)

    def _made(self, need: StageBytes, shares_table: bool) -> tuple[Made, ...]:
        """Return the gradients that each moment of a backward gives to the buckets of its stage."""
        if not shares_table:
            return tuple(moment.made for moment in need.moments)
        return tuple(NOTHING if moment.made.kind == TABLE else moment.made for moment in need.moments)

    def _under_way(self, span: StageSpan, backwards: int, shares_table: bool) -> UnderWay:
        """Return the buckets of a stage that were sent and wait for the next ones or for the end of the step."""
        found = UnderWay()
        for _ in range(backwards):
            made = self._made(self._stage(span)[1], shares_table)
            found = send_buckets(made, self._sending, found, early=not self._splits).under_way
        return found

    def _shares_table(self, spans: Sequence[StageSpan]) -> bool:
        """Return whether the first and the last stage are on this rank and share a table, which has its own bucket."""
        return self._config.model.tied_embeddings and len(spans) > 1 and spans[0].first and spans[-1].last

    def _shared_table(self, backwards: int) -> int:
        """Return the bytes of the buckets of a table that two stages share, and of the gradient that has begun."""
        table = Made(vocabulary_elements(self._config.model, self._config.parallel.tensor_parallel_size), TABLE)
        waits = UnderWay()
        for _ in range(backwards):
            waits = send_buckets((table,), self._sending, waits, early=False).under_way
        return sum(waits) + BYTES_PER_ELEMENT * table.elements * self._sending.sharded


def _held(moment: Moment, needs: Sequence[StageBytes]) -> int:
    """Return the bytes of all other microbatches at a moment."""
    kept = sum(number * need.kept for number, need in zip(moment.held, needs, strict=True))
    return kept + sum(number * need.deferred for number, need in zip(moment.deferred, needs, strict=True))


def _sharding(config: TrainConfig, dp_size: int) -> tuple[Placements, int, int]:
    """Return the placements of the ZeRO stage, and how many replicas share dense parameters and experts."""
    parallel = config.parallel
    replicas, of_experts = config.replica_counts(dp_size)
    placements = ZERO_STAGES[zero_stage(parallel.zero_stage, max(replicas, of_experts))]
    if not placements.state:
        return placements, 1, 1
    num_copies = replicas // (parallel.zero_shard_size or replicas)
    return placements, replicas // num_copies, of_experts // gcd(num_copies, of_experts)


def _largest_unit(config: TrainConfig, span: StageSpan) -> int:
    """Count the parameters of the largest block, or of the vocabulary table if the stage has one and it is larger."""
    model, parallel = config.model, config.parallel
    blocks = {model.has_experts(block) for block in range(span.start, span.stop)}
    sizes = [block_parameters(model, parallel, has_experts).total for has_experts in blocks]
    if span.first or span.last:
        sizes.append(vocabulary_elements(model, parallel.tensor_parallel_size))
    return max(sizes, default=0)

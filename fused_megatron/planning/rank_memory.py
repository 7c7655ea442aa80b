"""Formulas for the memory that a rank needs in training: weights, gradients, optimizer state, activations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd

from fused_megatron.assembly.pipeline_plan import plan_pipeline, stage_spans
from fused_megatron.config import TrainConfig
from fused_megatron.data_parallel.fixed_sizes import BUCKETS_UNDER_WAY, BYTES_PER_ELEMENT
from fused_megatron.data_parallel.placement import ZERO_STAGES, Placements, zero_stage
from fused_megatron.models import StageSpan
from fused_megatron.pipeline.schedule.action import Action, Kind, Schedule, stages_of
from fused_megatron.planning.activation_memory import stage_activations, working_bytes
from fused_megatron.planning.optimizer_memory import optimizer_bytes, update_bytes
from fused_megatron.planning.parameter_counts import (
    ParameterCounts,
    attention_features,
    block_parameters,
    expansion_features,
    stage_parameters,
    vocabulary_elements,
)

# Actions that end a microbatch's use of activations.
_FREES = (Kind.BACKWARD, Kind.WEIGHT_GRAD)


@dataclass(frozen=True)
class RankMemory:
    """Bytes that a rank holds at the peak of a step.

    Attributes:
        num_parameters: parameters of this rank (a number, not bytes).
        weights: 4 bytes a parameter in float32, 2 in bfloat16; with zero_stage=3 only for this rank's share.
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


def rank_memory(config: TrainConfig, pp_rank: int | None = None, data_parallel_size: int | None = None) -> RankMemory:
    """Compute the memory of one pipeline rank, or of the rank that needs most.

    Args:
        config: model.vocab_size must be given.
        pp_rank: pipeline rank; None: the rank that needs most.
        data_parallel_size: used if the config has none; None: 1.

    Raises:
        InputError: as plan_pipeline and cut_stages; vocab_size is None.
    """
    parallel, training = config.parallel, config.training
    plan = plan_pipeline(config)
    spans = stage_spans(config, plan)
    dp_size = parallel.data_parallel_size or data_parallel_size or 1
    schedule = plan.schedule(training.global_batch_size // training.microbatch_size // dp_size)
    ranks = range(parallel.pipeline_parallel_size) if pp_rank is None else (pp_rank,)
    found = [
        _memory_of_rank(config, schedule, dp_size, rank, {s: spans[s] for s in stages_of(plan.placement, rank)})
        for rank in ranks
    ]
    return max(found, key=lambda memory: memory.total)


def _memory_of_rank(
    config: TrainConfig, schedule: Schedule, dp_size: int, rank: int, spans: Mapping[int, StageSpan]
) -> RankMemory:
    size = config.training.element_bytes
    model, parallel, training = config.model, config.parallel, config.training
    counts = sum((stage_parameters(model, span, parallel) for span in spans.values()), ParameterCounts())
    if model.tied_embeddings and len(spans) > 1 and {0, schedule.num_stages - 1} <= spans.keys():
        # The first and the last stage share one table.
        counts += ParameterCounts(others=-vocabulary_elements(model, parallel.tensor_parallel_size))
    actions = schedule.actions[rank]
    held = _held_activations(config, actions, spans)
    activations = max(held)
    placements, shards, expert_shards = _sharding(config, dp_size)
    bucket = 0 if max(shards, expert_shards) == 1 else _bucket_bytes(config, spans.values())
    working = max(working_bytes(config, span) for span in spans.values())
    sent = min(4 * counts.total, BUCKETS_UNDER_WAY * bucket)
    own_matrices = -(-counts.matrices // shards) + -(-counts.expert_matrices // expert_shards)
    own_others = -(-counts.others // shards) + -(-counts.expert_others // expert_shards)
    own = own_matrices + own_others
    if placements.weights:
        largest = max(_largest_unit(config, span) for span in spans.values())
        working += size * (2 * largest if parallel.zero_gather == "block" else counts.total)
    # A packed copy leaves while its sum arrives. gloo receives the block of every rank; NCCL needs less, only the sum.
    if placements.gradients and bucket:  # in every backward; a bucket fills while the one before leaves
        working += 2 * sent + min(4 * counts.total, bucket)
        sent = 0
    reducing = 2 * sent + _beside_buckets(config, actions, spans, held, bucket, working) if sent else 0
    updating = update_bytes(config.optimizer, training.dtype, model, own)
    return RankMemory(
        counts.total,
        weights=size * (own if placements.weights else counts.total),
        gradients=4 * (own if placements.gradients else counts.total),
        optimizer=optimizer_bytes(config.optimizer, training.dtype, own_matrices, own_others),
        activations=activations,
        working=max(working, reducing - activations, updating - activations),
    )


def _sharding(config: TrainConfig, dp_size: int) -> tuple[Placements, int, int]:
    """Return the placements of the ZeRO stage, and how many replicas share dense parameters and experts."""
    parallel = config.parallel
    replicas, of_experts = config.replica_counts(dp_size)
    placements = ZERO_STAGES[zero_stage(parallel.zero_stage, max(replicas, of_experts))]
    if not placements.state:
        return placements, 1, 1
    num_copies = replicas // (parallel.zero_shard_size or replicas)
    return placements, replicas // num_copies, of_experts // gcd(num_copies, of_experts)


def _held_activations(config: TrainConfig, actions: Sequence[Action], spans: Mapping[int, StageSpan]) -> list[int]:
    """Return the bytes of activations that a rank holds after each forward, and at the start of each backward."""
    of_stage = {stage: stage_activations(config, span) for stage, span in spans.items()}
    found, held = [], 0
    for action in actions:
        held += of_stage[action.stage] * (action.kind == Kind.FORWARD)
        found.append(held)
        held -= of_stage[action.stage] * (action.kind in _FREES)
    return found


def _beside_buckets(
    config: TrainConfig,
    actions: Sequence[Action],
    spans: Mapping[int, StageSpan],
    held: Sequence[int],
    bucket: int,
    working: int,
) -> int:
    """Return the bytes of activations and temporary tensors that exist while buckets of gradients are sent.

    They are sent under the last backward of a stage. The first one leaves when the head and the last block are through.
    A stage with one bucket sends it after the backward.
    """
    last = {action.stage: index for index, action in enumerate(actions) if action.kind in _FREES}
    most = 0
    for stage, index in last.items():
        span = spans[stage]
        beside = held[index] - stage_activations(config, span)
        if BYTES_PER_ELEMENT * stage_parameters(config.model, span, config.parallel).total > bucket:
            beside += stage_activations(config, _without_last_block(span)) + working
        most = max(most, beside)
    return most


def _without_last_block(span: StageSpan) -> StageSpan:
    """Return the stage without its last block and without the head."""
    return replace(span, num_stages=span.num_stages + 1, stop=max(span.start, span.stop - 1))


def _bucket_bytes(config: TrainConfig, spans: Iterable[StageSpan]) -> int:
    """Compute the bytes of a bucket: bucket_mb, or its largest parameter if that is larger."""
    model, parallel = config.model, config.parallel
    ranks = parallel.tensor_parallel_size
    largest = model.hidden_size * max(attention_features(model, ranks))
    kinds = {model.has_experts(block) for span in spans for block in range(span.start, span.stop)}
    if False in kinds:
        largest = max(largest, model.hidden_size * expansion_features(model, model.ffn_size, ranks))
    if True in kinds:
        width = expansion_features(model, model.expert_ffn_size, parallel.expert_tensor_parallel_size)
        local = (model.num_experts or 0) // parallel.expert_parallel_size
        largest = max(largest, model.hidden_size * local * width)
    if any(span.first or span.last for span in spans):
        largest = max(largest, vocabulary_elements(model, ranks))
    return max(round(1e6 * config.training.bucket_mb), BYTES_PER_ELEMENT * largest)


def _largest_unit(config: TrainConfig, span: StageSpan) -> int:
    """Count the parameters of the largest block, or of the vocabulary table if the stage has one and it is larger."""
    model, parallel = config.model, config.parallel
    blocks = {model.has_experts(block) for block in range(span.start, span.stop)}
    sizes = [block_parameters(model, parallel, has_experts).total for has_experts in blocks]
    if span.first or span.last:
        sizes.append(vocabulary_elements(model, parallel.tensor_parallel_size))
    return max(sizes, default=0)

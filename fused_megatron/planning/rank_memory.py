"""Formulas for the memory that a rank needs in training: weights, gradients, optimizer state, activations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm

from fused_megatron.assembly.build import DTYPES, stage_spans
from fused_megatron.assembly.microbatches import most_positions
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.checks import check
from fused_megatron.config import TrainConfig, TransformerConfig
from fused_megatron.data_parallel.bucket_layout import BYTES_PER_ELEMENT
from fused_megatron.data_parallel.placement import ZERO_STAGES, zero_stage
from fused_megatron.data_parallel.reduction import BUCKETS_UNDER_WAY
from fused_megatron.models import StageSpan
from fused_megatron.ops.linear_cross_entropy_tile_shape import tile_bytes
from fused_megatron.overlap.chunk_choice import chunk_choice
from fused_megatron.pipeline.schedule.action import Action, Kind, Schedule, stages_of
from fused_megatron.planning.optimizer_memory import optimizer_bytes, update_bytes

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
    replicas = parallel.replicas(dp_size)
    schedule = plan.schedule(training.global_batch_size // training.microbatch_size // dp_size)
    ranks = range(parallel.pipeline_parallel_size) if pp_rank is None else (pp_rank,)
    found = [
        _memory_of_rank(config, schedule, replicas, rank, {s: spans[s] for s in stages_of(plan.placement, rank)})
        for rank in ranks
    ]
    return max(found, key=lambda memory: memory.total)


def _memory_of_rank(
    config: TrainConfig, schedule: Schedule, replicas: int, rank: int, spans: Mapping[int, StageSpan]
) -> RankMemory:
    size = DTYPES[config.training.dtype].itemsize
    ranks = config.parallel.tensor_parallel_size
    num_parameters = sum(stage_parameters(config.model, span, ranks) for span in spans.values())
    if config.model.tied_embeddings and len(spans) > 1 and {0, schedule.num_stages - 1} <= spans.keys():
        num_parameters -= _vocabulary(config.model, ranks)  # the first and the last stage share one table
    actions = schedule.actions[rank]
    held = _held_activations(config, actions, spans)
    activations = max(held)
    placements = ZERO_STAGES[zero_stage(config.parallel.zero_stage, replicas)]
    shards = (config.parallel.zero_shard_size or replicas) if placements.state else 1
    bucket = 0 if shards == 1 else _bucket_bytes(config, spans.values())
    largest = max(_largest_unit(config.model, span, ranks) for span in spans.values())
    working = max(_working(config, span) for span in spans.values())
    sent = min(4 * num_parameters, BUCKETS_UNDER_WAY * bucket)
    matrices = sum((span.stop - span.start) * _block_matrices(config.model, ranks) for span in spans.values())
    own = [-(-number // shards) for number in (matrices, num_parameters - matrices)]
    if placements.weights:
        working += size * (2 * largest if config.parallel.zero_gather == "block" else num_parameters)
    # A packed copy leaves while its sum arrives. gloo receives the block of every rank; NCCL needs less, only the sum.
    if placements.gradients and shards > 1:  # in every backward; a bucket fills while the one before leaves
        working += 2 * sent + min(4 * num_parameters, bucket)
        sent = 0
    reducing = 2 * sent + _beside_buckets(config, actions, spans, held, bucket, working) if sent else 0
    updating = update_bytes(config.optimizer, config.training.dtype, config.model, sum(own))
    return RankMemory(
        num_parameters,
        weights=size * (sum(own) if placements.weights else num_parameters),
        gradients=4 * (sum(own) if placements.gradients else num_parameters),
        optimizer=optimizer_bytes(config.optimizer, config.training.dtype, *own),
        activations=activations,
        working=max(working, reducing - activations, updating - activations),
    )


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
    ranks = config.parallel.tensor_parallel_size
    last = {action.stage: index for index, action in enumerate(actions) if action.kind in _FREES}
    most = 0
    for stage, index in last.items():
        span = spans[stage]
        beside = held[index] - stage_activations(config, span)
        if BYTES_PER_ELEMENT * stage_parameters(config.model, span, ranks) > bucket:
            beside += stage_activations(config, _without_last_block(span)) + working
        most = max(most, beside)
    return most


def _without_last_block(span: StageSpan) -> StageSpan:
    """Return the stage without its last block and without the head."""
    return replace(span, num_stages=span.num_stages + 1, stop=max(span.start, span.stop - 1))


def _bucket_bytes(config: TrainConfig, spans: Iterable[StageSpan]) -> int:
    """Compute the bytes of a bucket: bucket_mb, or its largest parameter if that is larger."""
    model, ranks = config.model, config.parallel.tensor_parallel_size
    largest = model.hidden_size * max(_outputs_and_inputs(model, ranks))
    if any(span.first or span.last for span in spans):
        largest = max(largest, _vocabulary(model, ranks))
    return max(round(1e6 * config.training.bucket_mb), BYTES_PER_ELEMENT * largest)


def _largest_unit(config: TransformerConfig, span: StageSpan, ranks: int) -> int:
    """Count the parameters of a block, or of the vocabulary table if the stage has one and it is larger."""
    one = StageSpan(span.index, span.num_stages, span.start, span.start + 1)
    none = StageSpan(span.index, span.num_stages, span.start, span.start)
    block = stage_parameters(config, one, ranks) - stage_parameters(config, none, ranks)
    return max(block, _vocabulary(config, ranks) if span.first or span.last else 0)


def stage_parameters(config: TransformerConfig, span: StageSpan, tensor_parallel_size: int) -> int:
    """Count the parameters of a stage on one of its R tensor-parallel ranks, with the padding of the vocabulary.

    A block with N heads and G key-value heads of size D, F = ffn_hidden_size, and F' = F, or 2 F for a gated MLP, has

        H (N D + 2 max(G, R) D + N D + F' + F) / R     weights
        (F' + (N + 2 max(G, R)) D) / R                 biases that are sharded
        2 H                                            biases that every rank holds
        2 * 2 H (RMS norm: 2 * H)                      norms, which every rank holds
    """
    hidden, ranks = config.hidden_size, tensor_parallel_size
    query_key_value, _, expansion, _ = _outputs_and_inputs(config, ranks)
    norm = hidden * (1 if config.normalization == "rms_norm" else 2)
    block = _block_matrices(config, ranks) + 2 * norm
    qkv_bias = config.linear_biases if config.qkv_bias is None else config.qkv_bias
    block += qkv_bias * query_key_value + config.linear_biases * (expansion + 2 * hidden)
    block += config.query_key_norm * 2 * config.head_size
    total = (span.stop - span.start) * block
    if span.first:
        total += _vocabulary(config, ranks) + (config.position == "learned") * config.seq_len * hidden
    if span.last:
        total += norm
        if not config.tied_embeddings or not span.first:
            total += _vocabulary(config, ranks)
    return total


def _block_matrices(config: TransformerConfig, ranks: int) -> int:
    """Count the elements of the matrices of a block on one rank."""
    return config.hidden_size * sum(_outputs_and_inputs(config, ranks))


def _outputs_and_inputs(config: TransformerConfig, ranks: int) -> tuple[int, int, int, int]:
    """Return a block's features on a rank: outputs of qkv, inputs of the projection, outputs of up, inputs of down."""
    query = config.num_heads * config.head_size // ranks
    key_value = 2 * max(1, config.kv_heads // ranks) * config.head_size
    ffn = config.ffn_size // ranks
    return query + key_value, query, ffn * (1 if _plain(config) else 2), ffn


def stage_activations(config: TrainConfig, span: StageSpan) -> int:
    """Compute the bytes that a stage keeps from forward for backward, for one microbatch.

    With context parallelism T counts the tokens of the rank that holds most. A block with T tokens (T' = T / R under
    sequence parallelism, else T) keeps these elements of 2 or 4 bytes:

        4 T' H                 inputs and outputs of both norms, and 4 T' bytes a norm for each statistic
        T (N + 2 G) D / R      query, key, value; query and key once more if they are rotated, twice if normalized
        T N D / R              input of the projection, which is the result of the attention kernel
        T F' / R               input of the activation; and its output T F / R without overlap (R = 1, or overlap=False)
        T' H                   instead of all of the above if recompute="full" recomputes the block

    and 4 T N / R bytes of statistics of the attention kernel, unless recompute="selective" recomputes it. Attention
    dropout keeps T (3 N D + 2 N S) / R elements instead of query, key, value and statistics: scores need a key for each
    query head. With context parallelism it keeps no more than without dropout.

    Korthikanti et al. 2022 (arXiv:2205.05198) count more: 34 (or 10 + 24 / R) S B H bytes and 5 A S^2 B. Their
    attention keeps its scores, and their GELU, dropout and residual additions keep their inputs.
    """
    model = config.model
    size, tokens, own_tokens = _sizes(config)
    hidden, norm_stats = model.hidden_size, 4 * (1 if model.normalization == "rms_norm" else 2)
    norm = size * 2 * own_tokens * hidden + norm_stats * own_tokens
    blocks = span.stop - span.start
    again = model.recomputed_blocks(blocks)
    of_recomputed = size * own_tokens * hidden if model.recompute == "full" else _block_activations(config, True)
    total = again * of_recomputed + (blocks - again) * _block_activations(config, False)
    if span.first:
        total += 8 * tokens
    if span.last:
        # The loss computes the gradient of hidden, and of the head if it is needed, and keeps them in float32.
        total += norm + 12 * tokens + 4 * own_tokens * hidden
        total += 4 * _vocabulary(model, config.parallel.tensor_parallel_size)
    return total


def _block_activations(config: TrainConfig, selective: bool) -> int:
    """Compute the bytes that one block keeps for backward, if it recomputes nothing or (selective) attention."""
    model, ranks = config.model, config.parallel.tensor_parallel_size
    size, tokens, own_tokens = _sizes(config)
    heads, kv_heads = model.num_heads // ranks, max(1, model.kv_heads // ranks)
    query, key = heads * model.head_size, kv_heads * model.head_size
    expansion = (model.ffn_size // ranks) * (1 if _plain(model) else 2)
    elements = 4 * own_tokens * model.hidden_size + tokens * (query + expansion)
    if ranks == 1 or chunk_choice(config.parallel.overlap).fixed == 1:  # the MLP runs layer by layer
        elements += tokens * model.ffn_size // ranks
    statistics = 2 * 4 * own_tokens * (1 if model.normalization == "rms_norm" else 2)
    statistics += 4 * tokens * (heads + kv_heads) * model.query_key_norm
    context_parallel = config.parallel.context_parallel_size > 1
    if not selective and model.attention_dropout > 0 and not context_parallel:
        elements += tokens * (3 * query + (query + key) * model.query_key_norm + 2 * heads * model.seq_len)
    else:
        copies = 2 if model.query_key_norm else int(model.position == "rotary")
        elements += tokens * (query + 2 * key + (query + key) * copies)
        statistics += 4 * tokens * heads * (not selective)
    return size * elements + statistics


def _working(config: TrainConfig, span: StageSpan) -> int:
    """Estimate the bytes of temporary tensors of a block's backward (MLP and attention), or of the head's tiles."""
    model, ranks = config.model, config.parallel.tensor_parallel_size
    size, tokens, _ = _sizes(config)
    expansion = (model.ffn_size // ranks) * (1 if _plain(model) else 2)
    block = size * tokens * (3 * expansion + 4 * model.hidden_size)
    if model.recompute == "full":
        block += _block_activations(config, True)
    elif model.recompute == "selective":
        block += size * tokens * 4 * (model.num_heads // ranks) * model.head_size
    head = 0
    if span.last:
        rows = _vocabulary(model, ranks) // model.hidden_size
        most = 2 * tile_bytes("cuda")  # two tiles if vocabulary shards exchange statistics
        head = min(4 * tokens * rows * (2 if ranks > 1 else 1), most) + 4 * tokens * model.hidden_size
    return max(block, head, _attention_working(config))


def _attention_working(config: TrainConfig) -> int:
    """Estimate the bytes of temporary tensors of the backward of context-parallel attention; 0 without it.

    A ring holds two messages, their gradients, and gradients of the own keys in float32. all_gather holds the keys of
    all ranks, while it gathers them twice, and their gradients in float32. all_to_all holds second copies of query,
    key, value and context, and gradients of them.
    """
    parallel, model = config.parallel, config.model
    ranks = parallel.context_parallel_size
    if ranks == 1:
        return 0
    size, tokens, _ = _sizes(config)
    query = tokens * (model.num_heads // parallel.tensor_parallel_size) * model.head_size
    keys = 2 * tokens * max(1, model.kv_heads // parallel.tensor_parallel_size) * model.head_size
    if parallel.context_parallel_method == "all_gather":
        return 4 * query + ranks * keys * (2 * size + 4)
    exchanged = 4 * size * (query + keys) if "all_to_all" in parallel.context_parallel_method else 0
    return 4 * query + keys * (4 * size + 4) + exchanged


def _sizes(config: TrainConfig) -> tuple[int, int, int]:
    """Return (bytes of an element, tokens of a microbatch, tokens of this rank between tensor-parallel layers)."""
    parallel = config.parallel
    tokens = config.training.microbatch_size * most_positions(config)
    own = tokens // parallel.tensor_parallel_size if parallel.sequence_parallel else tokens
    return DTYPES[config.training.dtype].itemsize, tokens, own


def _plain(config: TransformerConfig) -> bool:
    return config.activation.startswith("gelu")


def _vocabulary(config: TransformerConfig, ranks: int) -> int:
    """Count the elements of a rank's shard of the vocabulary table."""
    check(config.vocab_size is not None, "vocab_size=None must be given to know what the embedding holds")
    multiple = lcm(config.pad_vocab_size_to_multiple_of, ranks)
    return -(-(config.vocab_size or 0) // multiple) * multiple // ranks * config.hidden_size

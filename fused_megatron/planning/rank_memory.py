"""Memory that a rank needs to train, by formula: weights, gradients, optimizer, activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm

from fused_megatron.assembly.build import stage_spans
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.checks import check
from fused_megatron.config import TrainConfig, TransformerConfig
from fused_megatron.models import StageSpan
from fused_megatron.ops.linear_cross_entropy_tile_shape import tile_bytes
from fused_megatron.pipeline.schedule.action import Kind, Schedule, stages_of

_SIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank at the peak of a step.

    Attributes:
        num_parameters: that it holds.
        weights, gradients, optimizer: 2 or 4, 4 and 8 or 12 bytes each: gradients and moments are float32, and so are
            the main weights that bfloat16 has beside it.
        activations: kept from forward for backward, of all microbatches that are under way at once.
        working: about what a block or the head needs beside, while it computes.
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
    """Of a pipeline rank, or of the fullest one.

    Args:
        config: model.vocab_size must be given.
        pp_rank: None for the rank that holds most.
        data_parallel_size: where config leaves it open; 1 when not given.

    Raises:
        InputError: as plan_pipeline and cut_stages; no vocab_size.
    """
    parallel, training = config.parallel, config.training
    plan = plan_pipeline(config)
    spans = stage_spans(config, plan)
    replicas = parallel.data_parallel_size or data_parallel_size or 1
    schedule = plan.schedule(training.global_batch_size // training.microbatch_size // replicas)
    ranks = range(parallel.pipeline_parallel_size) if pp_rank is None else (pp_rank,)
    found = [_of_rank(config, schedule, rank, {s: spans[s] for s in stages_of(plan.placement, rank)}) for rank in ranks]
    return max(found, key=lambda memory: memory.total)


def _of_rank(config: TrainConfig, schedule: Schedule, rank: int, spans: Mapping[int, StageSpan]) -> RankMemory:
    size, ranks = _SIZES[config.training.dtype], config.parallel.tensor_parallel_size
    num_parameters = sum(stage_parameters(config.model, span, ranks) for span in spans.values())
    if config.model.tied_embeddings and len(spans) > 1 and {0, schedule.num_stages - 1} <= spans.keys():
        num_parameters -= _vocabulary(config.model, ranks)  # one table for both ends
    of_stage = {stage: stage_activations(config, span) for stage, span in spans.items()}
    held = activations = 0
    for action in schedule.actions[rank]:
        held += of_stage[action.stage] * (action.kind == Kind.FORWARD)
        held -= of_stage[action.stage] * (action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRAD))
        activations = max(activations, held)
    return RankMemory(
        num_parameters,
        weights=size * num_parameters,
        gradients=4 * num_parameters,
        optimizer=(8 if size == 4 else 12) * num_parameters,
        activations=activations,
        working=max(_working(config, span) for span in spans.values()),
    )


def stage_parameters(config: TransformerConfig, span: StageSpan, tensor_parallel_size: int) -> int:
    """Parameters of a stage on one of its R tensor-parallel ranks, padding of the vocabulary among them.

    With N heads and G key-value heads of D, F = ffn_hidden_size (twice for a gated MLP's first matrix): of a block

        H (N D + 2 max(G, R) D + N D + F' + F) / R     weights, and F' + (N + 2 max(G, R)) D over R of biases
        2 H of biases, 2 norms of 2 H (RMS: H)         whole on every rank
    """
    hidden, ranks = config.hidden_size, tensor_parallel_size
    query = config.num_heads * config.head_size // ranks
    key_value = 2 * max(1, config.kv_heads // ranks) * config.head_size
    ffn = config.ffn_size // ranks
    expansion = ffn * (1 if _plain(config) else 2)
    norm = hidden * (1 if config.normalization == "rms_norm" else 2)
    block = hidden * (2 * query + key_value + expansion + ffn) + 2 * norm
    qkv_bias = config.linear_biases if config.qkv_bias is None else config.qkv_bias
    block += qkv_bias * (query + key_value) + config.linear_biases * (expansion + 2 * hidden)
    block += config.query_key_norm * 2 * config.head_size
    total = (span.stop - span.start) * block
    if span.first:
        total += _vocabulary(config, ranks) + (config.position == "learned") * config.seq_len * hidden
    if span.last:
        total += norm
        if not config.tied_embeddings or not span.first:
            total += _vocabulary(config, ranks)
    return total


def stage_activations(config: TrainConfig, span: StageSpan) -> int:
    """Bytes that a stage keeps of one microbatch from forward for backward.

    Of a block (T tokens; T' = T / R under sequence parallelism, else T), elements of 2 or 4 bytes:

        4 T' H                          in and out of both norms; 4 T' bytes of statistics each
        T (N + 2 G) D / R               query, key, value; rotated or normalized once more those that are
        T N D / R                       what the projection multiplies
        T N D / R                       the attention kernel's result, and 4 T N / R bytes; not with "selective"
        T F' / R                        before the activation; at R = 1 T F after it, too
        T' H alone                      with "full"

    Less than the 34 (or 10 + 24 / R) S B H bytes and 5 A S^2 B of Korthikanti et al. 2022 (arXiv:2205.05198), whose
    attention keeps its scores and whose GELU, dropout and residual additions keep their inputs.
    """
    model = config.model
    size, tokens, own_tokens = _sizes(config)
    hidden, norm_stats = model.hidden_size, 4 * (1 if model.normalization == "rms_norm" else 2)
    norm = size * 2 * own_tokens * hidden + norm_stats * own_tokens
    total = (span.stop - span.start) * (
        size * own_tokens * hidden if model.recompute == "full" else _block_activations(config)
    )
    if span.first:
        total += 8 * tokens
    if span.last:
        # The gradients of hidden and, if it has to be made with the loss, of the head wait in float32.
        total += norm + 12 * tokens + 4 * own_tokens * hidden
        total += 4 * _vocabulary(model, config.parallel.tensor_parallel_size)
    return total


def _block_activations(config: TrainConfig) -> int:
    model, ranks = config.model, config.parallel.tensor_parallel_size
    size, tokens, own_tokens = _sizes(config)
    heads = model.num_heads // ranks
    query, key = heads * model.head_size, max(1, model.kv_heads // ranks) * model.head_size
    expansion = (model.ffn_size // ranks) * (1 if _plain(model) else 2)
    elements = 4 * own_tokens * model.hidden_size
    elements += tokens * (2 * query + 2 * key + expansion + (model.ffn_size if ranks == 1 else 0))
    elements += tokens * (query + key) * ((model.position == "rotary") + model.query_key_norm)
    statistics = 2 * 4 * own_tokens * (1 if model.normalization == "rms_norm" else 2)
    if model.recompute == "none":
        elements += tokens * query
        statistics += 4 * tokens * heads
        if model.attention_dropout > 0:
            elements += 2 * tokens * heads * model.seq_len
    return size * elements + statistics


def _working(config: TrainConfig, span: StageSpan) -> int:
    """A block's backward holds some tensors of the width of its MLP and its attention at once; the head its tiles."""
    model, ranks = config.model, config.parallel.tensor_parallel_size
    size, tokens, _ = _sizes(config)
    expansion = (model.ffn_size // ranks) * (1 if _plain(model) else 2)
    block = size * tokens * (3 * expansion + 4 * model.hidden_size)
    if model.recompute == "full":
        block += _block_activations(config)
    elif model.recompute == "selective":
        block += size * tokens * 4 * (model.num_heads // ranks) * model.head_size
    head = 0
    if span.last:
        rows = _vocabulary(model, ranks) // model.hidden_size
        most = 2 * tile_bytes("cuda")  # two tiles where shards exchange
        head = min(4 * tokens * rows * (2 if ranks > 1 else 1), most) + 4 * tokens * model.hidden_size
    return max(block, head)


def _sizes(config: TrainConfig) -> tuple[int, int, int]:
    """(bytes of an element, tokens of a microbatch, those that this rank holds between the tensor-parallel layers)."""
    tokens, parallel = config.training.microbatch_size * config.model.seq_len, config.parallel
    own = tokens // parallel.tensor_parallel_size if parallel.sequence_parallel else tokens
    return _SIZES[config.training.dtype], tokens, own


def _plain(config: TransformerConfig) -> bool:
    return config.activation.startswith("gelu")


def _vocabulary(config: TransformerConfig, ranks: int) -> int:
    """Elements of a shard of the table."""
    check(config.vocab_size is not None, "vocab_size=None must be given to know what the embedding holds")
    multiple = lcm(config.pad_vocab_size_to_multiple_of, ranks)
    return -(-(config.vocab_size or 0) // multiple) * multiple // ranks * config.hidden_size

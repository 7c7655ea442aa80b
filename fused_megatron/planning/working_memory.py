"""Formulas for the most memory that the activations and temporary tensors of a stage take, for one microbatch."""

from dataclasses import dataclass
from typing import NamedTuple

from fused_megatron.config import TrainConfig
from fused_megatron.models import StageSpan
from fused_megatron.pipeline.schedule.action import Kind
from fused_megatron.planning.activation_memory import (
    deferred_by_experts,
    deferred_mlp_elements,
    element_and_token_sizes,
    kept_by_block,
    kept_by_ends,
    loss_activations,
    mlp_elements,
)
from fused_megatron.planning.block_backward import BackwardMoment, block_backward, score_bytes
from fused_megatron.planning.bucket_memory import BEGUN_TABLE, TABLE, Made
from fused_megatron.planning.parameter_counts import vocabulary_elements

# tile_bytes("cuda") of ops/linear_cross_entropy_tile_shape.py, which imports torch.
_TILE_BYTES = 256 << 20


@dataclass(frozen=True)
class StageBytes:
    """Bytes that one microbatch of a stage needs.

    Attributes:
        kept: bytes that a forward leaves for backward.
        deferred: bytes between INPUT_GRAD and WEIGHT_GRAD.
        forward, backward, input_grad, weight_grad: the most bytes at once inside an action of this kind, with what was
            kept or deferred before.
        moments: moments of the backward, from the head to the embedding.
    """

    kept: int
    deferred: int
    forward: int
    backward: int
    input_grad: int
    weight_grad: int
    moments: tuple[BackwardMoment, ...]

    def peak(self, kind: Kind) -> int:
        """Return the most bytes at once inside an action of this kind."""
        of_kind = {Kind.FORWARD: self.forward, Kind.INPUT_GRAD: self.input_grad, Kind.WEIGHT_GRAD: self.weight_grad}
        return of_kind.get(kind, self.backward)


class BlockBytes(NamedTuple):
    """Bytes of one microbatch in a block: kept for backward, added at the moments of its backward, and deferred."""

    kept: int
    backward: list[BackwardMoment]
    deferred: int


KnownBlocks = dict[tuple[bool, bool], BlockBytes]
"""Bytes of the blocks of one config, by (whether it is recomputed, whether it has experts)."""


def stage_bytes(config: TrainConfig, span: StageSpan, known: KnownBlocks | None = None) -> StageBytes:
    """Compute the bytes that one microbatch of a stage needs.

    Args:
        config: the config of the whole run.
        span: the blocks of the stage.
        known: what other stages of this config have computed; this one's blocks are added.
    """
    model, of_kind = config.model, {} if known is None else known
    size, _, own = element_and_token_sizes(config)
    residual = size * own * model.hidden_size
    blocks = [model.has_experts(block) for block in range(span.start, span.stop)]
    again = model.recomputed_blocks(len(blocks))
    kinds = [(index < again, has_experts) for index, has_experts in enumerate(blocks)]
    for kind in set(kinds) - of_kind.keys():
        of_kind[kind] = BlockBytes(
            kept_by_block(config, *kind),
            block_backward(config, kind[1], kind[0] and model.recompute == "full"),
            block_deferred(config, kind[1]),
        )
    kept = sum(of_kind[kind].kept for kind in kinds) + kept_by_ends(config, span)
    # Before the backward of the last block, the loss's tensors and the final norm have gone.
    before = kept - (loss_activations(config) if span.last else 0)
    moments = _head_moments(config, span, kept, before)
    input_grad = max(num_bytes for num_bytes, _ in moments)
    deferred = 0  # of the blocks whose INPUT_GRAD is through
    for kind in reversed(kinds):
        of_block, of_backward, later = of_kind[kind]
        moments += [BackwardMoment(before + num_bytes, made) for num_bytes, made in of_backward]
        input_grad = max(input_grad, before + deferred + max(num_bytes for num_bytes, _ in of_backward))
        before -= of_block
        deferred += later
    moments += _embedding_moments(config, span, before)
    deferred += before
    head = head_working(config) if span.last else 0
    forward = kept + max(head, residual)
    if blocks and (scores := score_bytes(config)):
        forward = max(
            forward, kept - (loss_activations(config) if span.last else 0) + _scores_in_forward(config, scores)
        )
    backward = max(num_bytes for num_bytes, _ in moments)
    return StageBytes(kept, deferred, forward, backward, max(input_grad, deferred), deferred, tuple(moments))


def _head_moments(config: TrainConfig, span: StageSpan, kept: int, before: int) -> list[BackwardMoment]:
    """Return the moments of a backward before its blocks: of the head and the final norm."""
    model = config.model
    size, _, own = element_and_token_sizes(config)
    residual = size * own * model.hidden_size
    if not span.last:
        return [BackwardMoment(before + residual)]
    table = vocabulary_elements(model, config.parallel.tensor_parallel_size)
    kind = BEGUN_TABLE if span.first and model.tied_embeddings else TABLE
    norm = model.hidden_size * (1 if model.normalization == "rms_norm" else 2)
    gradient = 4 * own * model.hidden_size
    return [BackwardMoment(kept, Made(table, kind)), BackwardMoment(before + 2 * residual + gradient, Made(norm))]


def _embedding_moments(config: TrainConfig, span: StageSpan, before: int) -> list[BackwardMoment]:
    """Return the moments of a backward after its blocks: of the embedding, and of the stage's input."""
    model, parallel = config.model, config.parallel
    size, tokens, own = element_and_token_sizes(config)
    residual = size * own * model.hidden_size
    if not span.first:
        return [BackwardMoment(before + 2 * residual)]
    positions = (model.position == "learned") * model.seq_len * model.hidden_size
    table = vocabulary_elements(model, parallel.tensor_parallel_size)
    gathered = (size * tokens * model.hidden_size) * (2 if parallel.sequence_parallel else 1)
    return [
        BackwardMoment(before + residual + gathered, Made(positions)),
        BackwardMoment(before + residual + gathered, Made(table, TABLE)),
        BackwardMoment(before),
    ]


def head_working(config: TrainConfig) -> int:
    """Compute the bytes of the loss beyond what it keeps: tiles of logits, and partial sums of the gradient of hidden.

    A tile has all tokens if it is small enough. Otherwise ranks that exchange statistics have two tiles of half the
    size. Sequence parallelism gathers hidden; the partial sums arrive whole for a shard.
    """
    model, ranks = config.model, config.parallel.tensor_parallel_size
    size, tokens, _ = element_and_token_sizes(config)
    row_bytes = size * vocabulary_elements(model, ranks) // model.hidden_size
    if tokens * row_bytes <= _TILE_BYTES:
        chunk, logits = tokens, tokens * row_bytes
    else:
        chunk = max(1, _TILE_BYTES // row_bytes // min(ranks, 2))
        logits = min(ranks, 2) * chunk * row_bytes
    if ranks == 1:
        return logits
    hidden = size * chunk * model.hidden_size
    return logits + (3 * hidden + hidden // ranks if config.parallel.sequence_parallel else hidden)


def block_deferred(config: TrainConfig, has_experts: bool) -> int:
    """Compute the bytes of a block between INPUT_GRAD and WEIGHT_GRAD: operands of products and their gradients.

    With sequence parallelism the gathered input of attention stays beside the shard; gradients of outputs are whole.
    """
    model, ranks = config.model, config.parallel.tensor_parallel_size
    size, tokens, own = element_and_token_sizes(config)
    query = model.num_heads // ranks * model.head_size
    keys = 2 * max(1, model.kv_heads // ranks) * model.head_size
    shard = own if config.parallel.sequence_parallel else 0
    attention = size * ((2 * tokens + shard) * model.hidden_size + tokens * (2 * query + keys))
    if has_experts:
        return attention + deferred_by_experts(config)
    return attention + size * (2 * tokens * model.hidden_size + deferred_mlp_elements(config, model.ffn_size))


def _scores_in_forward(config: TrainConfig, scores: int) -> int:
    """Compute what the attention of a stage's last block has in forward beyond all that the stage's blocks keep.

    The MLP of the block keeps nothing yet. Where whole blocks are recomputed, no block keeps scores or an MLP.
    """
    model = config.model
    size, tokens, own = element_and_token_sizes(config)
    ranks = config.parallel.tensor_parallel_size
    query = size * tokens * (model.num_heads // ranks) * model.head_size
    key = size * tokens * max(1, model.kv_heads // ranks) * model.head_size
    working = query + 3 * key
    if model.recompute == "full":
        return 4 * scores + working
    later = 2 * own * model.hidden_size + mlp_elements(config, model.ffn_size)  # and the attention's result
    return (4 if model.recompute == "selective" else 2) * scores + working - size * later - query

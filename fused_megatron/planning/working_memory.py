"""Formulas for the most memory that the activations and temporary tensors of a stage take, for one microbatch."""

from dataclasses import dataclass
from typing import NamedTuple

from fused_megatron.config import TrainConfig
from fused_megatron.models import StageSpan
from fused_megatron.pipeline.schedule.action import Kind
from fused_megatron.planning.activation_memory import (
    block_activations,
    deferred_by_experts,
    deferred_mlp_elements,
    element_and_token_sizes,
    kept_by_block,
    kept_by_ends,
    loss_activations,
    mlp_elements,
)
from fused_megatron.planning.parameter_counts import expansion_features, vocabulary_elements
from fused_megatron.planning.rank_communication import own_tokens

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
        by_block: the most bytes at once in the backward of each block, the last one first, and 0 after the backward.
    """

    kept: int
    deferred: int
    forward: int
    backward: int
    input_grad: int
    weight_grad: int
    by_block: tuple[int, ...]

    def peak(self, kind: Kind) -> int:
        """Return the most bytes at once inside an action of this kind."""
        of_kind = {Kind.FORWARD: self.forward, Kind.INPUT_GRAD: self.input_grad, Kind.WEIGHT_GRAD: self.weight_grad}
        return of_kind.get(kind, self.backward)


class BlockBytes(NamedTuple):
    """Bytes of one microbatch in a block: kept for backward, added by its backward at its peak, and deferred."""

    kept: int
    backward: int
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
    backward = input_grad = before + residual
    by_block = []
    deferred = 0  # of the blocks whose INPUT_GRAD is through
    for kind in reversed(kinds):
        of_block, working, later = of_kind[kind]
        peak = before + working
        backward, input_grad = max(backward, peak), max(input_grad, peak + deferred)
        before -= of_block
        deferred += later
        by_block.append(peak)
    deferred += before
    head = head_working(config) if span.last else 0
    forward = kept + max(head, residual)
    if blocks and (scores := score_bytes(config)):
        forward = max(
            forward, kept - (loss_activations(config) if span.last else 0) + _scores_in_forward(config, scores)
        )
    return StageBytes(kept, deferred, forward, backward, max(input_grad, deferred), deferred, (*by_block, 0))


def head_working(config: TrainConfig) -> int:
    """Compute the bytes of tiles of logits; two of them if vocabulary shards exchange statistics."""
    model, ranks = config.model, config.parallel.tensor_parallel_size
    _, tokens, _ = element_and_token_sizes(config)
    rows = vocabulary_elements(model, ranks) // model.hidden_size
    tiles = 2 if ranks > 1 else 1
    return min(4 * tokens * rows * tiles, 2 * _TILE_BYTES)


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


def score_bytes(config: TrainConfig) -> int:
    """Compute the bytes of the scores of attention, if they are stored: only with attention dropout.

    Four tensors of this size exist at a time: scores, probabilities, and both again after the mask or in backward. Two
    of them are kept for backward, unless attention is recomputed.
    """
    model, parallel = config.model, config.parallel
    if not model.stores_scores or parallel.context_parallel_size > 1:
        return 0
    size, tokens, _ = element_and_token_sizes(config)
    return size * tokens * model.seq_len * (model.num_heads // parallel.tensor_parallel_size)


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


def block_backward(config: TrainConfig, has_experts: bool, recomputed: bool) -> int:
    """Compute the bytes that the backward of a block adds at its peak to what the block kept.

    A recomputed block kept its input; backward makes the rest again.
    """
    model, parallel = config.model, config.parallel
    size, tokens, own = element_and_token_sizes(config)
    ranks = parallel.tensor_parallel_size
    residual, whole = size * own * model.hidden_size, size * tokens * model.hidden_size
    selective = recomputed or model.recompute == "selective"
    again = block_activations(config, recomputed, has_experts) - residual if recomputed else 0
    query = size * tokens * (model.num_heads // ranks) * model.head_size
    keys = 2 * size * tokens * max(1, model.kv_heads // ranks) * model.head_size
    gathered = whole if parallel.sequence_parallel else 0
    if has_experts:
        rows = size * model.experts_per_token * own_tokens(config) * model.hidden_size
        feed_forward = 4 * whole + rows * (parallel.expert_tensor_parallel_size + 3)
        kept = 0
    else:
        up = size * tokens * expansion_features(model, model.ffn_size, ranks)
        down = size * tokens * (model.ffn_size // ranks)
        kept = size * mlp_elements(config, model.ffn_size)
        feed_forward = residual + up + down + gathered - (kept - up)
        feed_forward = max(feed_forward, residual + up + gathered + whole - (kept - up))
    attention = 2 * residual + 2 * query + keys + max(query + keys, gathered)
    if selective and not recomputed:
        attention += size * tokens * (model.num_heads // ranks)
    scores = score_bytes(config)
    attention = max(attention + scores, 2 * residual + _attention_working(config))
    if scores and selective:
        attention = max(attention, 4 * scores + residual + query)
    attention -= kept + residual
    return again + max(feed_forward, attention)


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
    size, tokens, _ = element_and_token_sizes(config)
    query = tokens * (model.num_heads // parallel.tensor_parallel_size) * model.head_size
    keys = 2 * tokens * max(1, model.kv_heads // parallel.tensor_parallel_size) * model.head_size
    if parallel.context_parallel_method == "all_gather":
        return 4 * query + ranks * keys * (2 * size + 4)
    exchanged = 4 * size * (query + keys) if "all_to_all" in parallel.context_parallel_method else 0
    return 4 * query + keys * (4 * size + 4) + exchanged

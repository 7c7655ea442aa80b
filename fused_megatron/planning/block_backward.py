"""Moments of the backward of a block: the bytes at each of its products, and the gradients of weights made there."""

from typing import NamedTuple

from fused_megatron.config import TrainConfig
from fused_megatron.planning.activation_memory import (
    block_activations,
    deferred_by_experts,
    deferred_mlp_elements,
    element_and_token_sizes,
    expert_activations,
    mlp_elements,
)
from fused_megatron.planning.bucket_memory import EXPERTS, Made
from fused_megatron.planning.parameter_counts import attention_features, block_parameters, expansion_features
from fused_megatron.planning.rank_communication import own_tokens

NOTHING = Made(0)


class BackwardMoment(NamedTuple):
    """A moment of a backward.

    Attributes:
        num_bytes: bytes of activations and of temporary tensors.
        made: gradients of weights that are made at it.
        gathered: elements of weights that are whole or arrive at it, where ZeRO gathers them block by block.
    """

    num_bytes: int
    made: Made = NOTHING
    gathered: int = 0


class BlockMoment(NamedTuple):
    """A moment of the backward of a block.

    Attributes:
        num_bytes: bytes beyond what this block and earlier ones keep.
        made: gradients of weights that are made at it.
        put_off: bytes that the block has kept for its WEIGHT_GRAD by then, if its gradients of weights are deferred.
    """

    num_bytes: int
    made: Made = NOTHING
    put_off: int = 0


class _Sizes(NamedTuple):
    """Bytes of the tensors of a block.

    Attributes:
        residual: of the stream between tensor-parallel layers; whole: of all rows.
        query, keys: of queries; of keys and values together.
        gathered: of rows that sequence parallelism gathers for a backward of a product.
        to_input: beside a gradient, what a product adds that computes the gradient of its input. With sequence
            parallelism the input is gathered again, and the sums leave and arrive whole for a shard.
        dropped: of the gradient after dropout.
    """

    residual: int
    whole: int
    query: int
    keys: int
    gathered: int
    to_input: int
    dropped: int


def block_backward(config: TrainConfig, has_experts: bool, recomputed: bool) -> list[BlockMoment]:
    """Return the moments of the backward of a block.

    A recomputed block kept its input; backward makes the rest again.
    """
    sizes = _sizes(config)
    selective = config.model.recompute == "selective"
    kept = block_activations(config, selective, has_experts)
    moments: list[BlockMoment] = []
    again = 0
    if recomputed:  # checkpoint holds the results of both parts and of the block until all is made again
        again = kept - sizes.residual
        attention = 3 * sizes.residual + 3 * sizes.query + sizes.keys + 4 * score_bytes(config)
        moments.append(BlockMoment(max(again + 4 * sizes.residual, attention)))
    of_parts = [*_feed_forward(config, sizes, has_experts), *_attention(config, sizes, has_experts, selective, kept)]
    return moments + [moment._replace(num_bytes=again + moment.num_bytes) for moment in of_parts]


def _sizes(config: TrainConfig) -> _Sizes:
    model, parallel = config.model, config.parallel
    size, tokens, own = element_and_token_sizes(config)
    ranks = parallel.tensor_parallel_size
    residual, whole = size * own * model.hidden_size, size * tokens * model.hidden_size
    return _Sizes(
        residual,
        whole,
        query=size * tokens * (model.num_heads // ranks) * model.head_size,
        keys=2 * size * tokens * max(1, model.kv_heads // ranks) * model.head_size,
        gathered=whole if parallel.sequence_parallel else 0,
        to_input=3 * whole + residual if parallel.sequence_parallel else whole,
        dropped=residual if model.hidden_dropout else 0,
    )


def _feed_forward(config: TrainConfig, sizes: _Sizes, has_experts: bool) -> list[BlockMoment]:
    """Return the moments of the backward of an MLP, or of experts."""
    model, parallel = config.model, config.parallel
    residual = sizes.residual
    if has_experts:
        rows = config.training.element_bytes * model.experts_per_token * own_tokens(config) * model.hidden_size
        working = 4 * sizes.whole + rows * (parallel.expert_tensor_parallel_size + 3)
        experts = block_parameters(model, parallel, has_experts)
        return [
            BlockMoment(working, Made(experts.experts, EXPERTS)),
            BlockMoment(2 * residual - expert_activations(config), Made(_dense_beside_attention(config))),
        ]
    size, tokens, _ = element_and_token_sizes(config)
    ranks, width = parallel.tensor_parallel_size, model.ffn_size
    up = size * tokens * expansion_features(model, width, ranks)
    down = size * tokens * (width // ranks)
    kept = size * mlp_elements(config, width)
    bias = model.linear_biases * model.hidden_size
    down_made = Made(model.hidden_size * (width // ranks) + bias)
    up_made = Made((model.hidden_size + model.linear_biases) * expansion_features(model, width, ranks))
    result = sizes.gathered or sizes.dropped  # the gradient of the result, unless it is the stream's own
    if kept == up:  # the fused MLP makes the activation again, and its products overlap
        first = residual + up + down + sizes.gathered
        second = residual + up + sizes.gathered + sizes.whole
        return [BlockMoment(first, down_made), BlockMoment(second, up_made)]
    return [
        BlockMoment(residual + sizes.dropped + sizes.gathered + down, down_made),
        BlockMoment(residual + up, put_off=result + down),
        BlockMoment(residual - down + sizes.to_input, up_made, put_off=result + down),
        BlockMoment(2 * residual - kept, Made(_norm(config)), put_off=deferred_mlp(config)),
    ]


def _attention(config: TrainConfig, sizes: _Sizes, has_experts: bool, selective: bool, kept: int) -> list[BlockMoment]:
    """Return the moments of the backward of attention, when the feed-forward has let go of what it kept.

    Args:
        kept: all that the block keeps; selective: whether attention is computed again.
    """
    model, ranks = config.model, config.parallel.tensor_parallel_size
    size, tokens, _ = element_and_token_sizes(config)
    hidden, residual, query = model.hidden_size, sizes.residual, sizes.query
    of_mlp = expert_activations(config) if has_experts else size * mlp_elements(config, model.ffn_size)
    before = -of_mlp - residual  # the gradient of the stream is there, a norm's output and the stream's sum are gone
    features, heads = attention_features(model, ranks)
    qkv_bias = model.linear_biases if model.qkv_bias is None else model.qkv_bias
    projection = Made(hidden * heads + model.linear_biases * hidden)
    working = _core_working(config, sizes)
    if selective:
        working += 4 * tokens * (model.num_heads // ranks)
    scores = score_bytes(config)
    if scores:
        working = max(working, query + 4 * scores if selective else scores)
    put_off = deferred_by_experts(config) if has_experts else deferred_mlp(config)
    of_projection = sizes.whole + query
    to_input = 3 * residual - kept + query + sizes.keys + sizes.to_input
    return [
        BlockMoment(before + sizes.dropped + sizes.gathered + query, projection, put_off),
        BlockMoment(before + query + working, put_off=put_off + (of_projection if selective else sizes.whole)),
        BlockMoment(to_input, Made((hidden + qkv_bias) * features), put_off + of_projection),
        BlockMoment(4 * residual - kept, Made(_norm(config)), put_off + of_projection),
    ]


def _core_working(config: TrainConfig, sizes: _Sizes) -> int:
    """Compute the bytes that the backward of attention adds: gradients of queries, keys and values.

    Without context parallelism they are all. A ring has the gradient of queries and three sets of gradients of keys in
    float32 (its own, those of the message that it computes and of the message before), the message of keys, a
    message of gradients that leaves and one that arrives, and the parts that the kernels return. all_gather has the
    keys of all ranks and their gradients in float32; then blocks of gradients leave and as many arrive. all_to_all
    has the gradients in float32 and two copies of them on the way back. A ring of groups that exchange heads has both.
    """
    parallel, query, keys = config.parallel, sizes.query, sizes.keys
    ranks, method = parallel.context_parallel_size, parallel.context_parallel_method
    if ranks == 1:
        return query + keys
    in_float32 = 4 / config.training.element_bytes
    if method == "all_gather":
        return round(query * in_float32 + ranks * keys * (3 + in_float32) + keys)
    exchanged = 2 * (query + keys) if "all_to_all" in method else 0
    if method == "all_to_all":
        return round((query + keys) * in_float32) + exchanged
    return round(query * (in_float32 + 0.75) + keys * (3 * in_float32 + 3.5)) + exchanged


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


def deferred_mlp(config: TrainConfig) -> int:
    """Compute the bytes of an MLP between INPUT_GRAD and WEIGHT_GRAD: operands of products and their gradients.

    With sequence parallelism the gathered input stays beside the norm's output; gradients of results are whole.
    """
    size, tokens, own = element_and_token_sizes(config)
    shard = own if config.parallel.sequence_parallel else 0
    return size * (
        (2 * tokens + shard) * config.model.hidden_size + deferred_mlp_elements(config, config.model.ffn_size)
    )


def _norm(config: TrainConfig) -> int:
    return config.model.hidden_size * (1 if config.model.normalization == "rms_norm" else 2)


def _dense_beside_attention(config: TrainConfig) -> int:
    """Count the dense parameters of a block with experts outside of attention: router, shared expert, norm."""
    with_experts = block_parameters(config.model, config.parallel, True).dense
    features, heads = attention_features(config.model, config.parallel.tensor_parallel_size)
    return with_experts - config.model.hidden_size * (features + heads)

"""Formulas for the memory of activations that a stage keeps for backward."""

from fused_megatron.config import TrainConfig
from fused_megatron.models import StageSpan
from fused_megatron.planning.parameter_counts import expansion_features, vocabulary_elements
from fused_megatron.planning.rank_communication import expert_dispatch, own_tokens


def kept_by_block(config: TrainConfig, recomputed: bool, has_experts: bool) -> int:
    """Compute the bytes that a block keeps from forward for backward, for one microbatch.

    With context parallelism T counts the tokens of the rank that holds most. With T tokens (T' = T / R under sequence
    parallelism, else T) these elements of 2 or 4 bytes are kept:

        4 T' H                 inputs and outputs of both norms, and 4 T' bytes a norm for each statistic
        T (N + 2 G) D / R      query, key, value, rotated in place
        T (N + G) D / R        query and key once more if they are normalized: backward needs them from before the norm;
                               twice more, and 4 T (N + G) / R bytes, if they are normalized over all heads
        T N D / R              input of the projection, which is the result of the attention kernel
        T F' / R               input of the activation; and its output T F / R without overlap (R = 1, or overlap=False)
        (expert_activations)   instead of the last line, in a block with experts
        T' H                   instead of all of the above if recompute="full" recomputes the block

    and 4 T N / R bytes of statistics of the attention kernel, unless recompute="selective" recomputes it. Attention
    dropout keeps T (3 N D + 2 N S) / R elements instead of query, key, value and statistics, unless
    attention_dropout_kernel="fast": scores need a key for each query head. Query, key and value from before the norm
    stay beside them. With context parallelism it keeps no more than without dropout.

    Korthikanti et al. 2022 (arXiv:2205.05198) count more: 34 (or 10 + 24 / R) S B H bytes and 5 A S^2 B. Their
    attention keeps its scores, and their GELU, dropout and residual additions keep their inputs.
    """
    if recomputed and config.model.recompute == "full":
        size, _, own_tokens = element_and_token_sizes(config)
        return size * own_tokens * config.model.hidden_size + has_experts * _order_of_sent_tokens(config)
    return block_activations(config, recomputed, has_experts)


def kept_by_ends(config: TrainConfig, span: StageSpan) -> int:
    """Compute the bytes that the embedding, the final norm, the head and the loss of a stage keep for backward."""
    _, tokens, _ = element_and_token_sizes(config)
    return (8 * tokens if span.first else 0) + (loss_activations(config) if span.last else 0)


def loss_activations(config: TrainConfig) -> int:
    """Compute the bytes that the final norm, the head and the loss keep for backward.

    The loss computes the gradient of hidden, and of the head if it is needed, and keeps them in float32.
    """
    model = config.model
    size, tokens, own_tokens = element_and_token_sizes(config)
    norm_stats = 4 * (1 if model.normalization == "rms_norm" else 2)
    norm = own_tokens * (size * 2 * model.hidden_size + norm_stats)
    gradients = 4 * own_tokens * model.hidden_size
    return norm + 12 * tokens + gradients + 4 * vocabulary_elements(model, config.parallel.tensor_parallel_size)


def block_activations(config: TrainConfig, selective: bool, has_experts: bool) -> int:
    """Compute the bytes that one block keeps for backward, if it recomputes nothing or (selective) attention."""
    model, ranks = config.model, config.parallel.tensor_parallel_size
    size, tokens, own_tokens = element_and_token_sizes(config)
    heads, kv_heads = model.num_heads // ranks, max(1, model.kv_heads // ranks)
    query, key = heads * model.head_size, kv_heads * model.head_size
    elements = 4 * own_tokens * model.hidden_size + tokens * query
    elements += 0 if has_experts else mlp_elements(config, model.ffn_size)
    statistics = 2 * 4 * own_tokens * (1 if model.normalization == "rms_norm" else 2)
    norms = model.query_key_norm * (2 if model.query_key_norm_over == "all_heads" else 1)
    statistics += 4 * tokens * (heads + kv_heads) * (norms == 2)
    context_parallel = config.parallel.context_parallel_size > 1
    if context_parallel and "all_to_all" in config.parallel.context_parallel_method:
        elements += tokens * query  # the result of the kernel, beside its part that came back
    if not selective and model.stores_scores and not context_parallel:
        elements += tokens * (3 * query + (query + 2 * key) * model.query_key_norm + 2 * heads * model.seq_len)
    else:
        elements += tokens * (query + 2 * key + (query + key) * norms)
        statistics += 4 * tokens * heads * (not selective)
    return size * elements + statistics + (expert_activations(config) if has_experts else 0)


def _order_of_sent_tokens(config: TrainConfig) -> int:
    """Compute the bytes of a block's exchange of tokens, which stay although backward repeats the forward."""
    parallel, selected = config.parallel, config.model.experts_per_token
    ranks = parallel.expert_parallel_size * parallel.expert_tensor_parallel_size
    of_a_pair = 16 * ranks + 8 if expert_dispatch(config) == "all_gather" else 40
    return of_a_pair * selected * own_tokens(config) * (ranks > 1)


def mlp_elements(config: TrainConfig, width: int) -> int:
    """Count the elements that an MLP of this width keeps for backward, without its input."""
    ranks = config.parallel.tensor_parallel_size
    _, tokens, _ = element_and_token_sizes(config)
    return tokens * (expansion_features(config.model, width, ranks) + _keeps_activation(config) * width // ranks)


def _keeps_activation(config: TrainConfig) -> bool:
    """Return whether an MLP keeps its activation, as its products run one after the other."""
    return config.parallel.tensor_parallel_size == 1 or config.parallel.whole_products


def expert_activations(config: TrainConfig) -> int:
    """Compute the bytes that a mixture of experts keeps for backward, without its input; routes are balanced.

    With T tokens that this rank brings and N = K T etp rows of its experts (kept_by_block states the shapes):

        N F' / etp              input of the activation
        N H                     rows that came from other ranks; all_gather: ep etp T H, the tokens of all ranks
        16 N bytes              order of the rows
        4 T E + 12 T K bytes    scores and routes, and 8 E bytes of counts
    """
    model, parallel = config.model, config.parallel
    size, _, between = element_and_token_sizes(config)
    ep, etp = parallel.expert_parallel_size, parallel.expert_tensor_parallel_size
    hidden, own, selected = model.hidden_size, own_tokens(config), model.experts_per_token
    rows = selected * own * etp
    elements = rows * expansion_features(model, model.expert_ffn_size, etp)
    total = 8 * rows + own * (4 * (model.num_experts or 0) + 12 * selected) + 8 * (model.num_experts or 0)
    if ep * etp == 1:
        total += 8 * rows
    elif expert_dispatch(config) == "all_gather":
        elements += ep * etp * own * hidden
        total += 12 * selected * ep * etp * own + 16 * selected * own
    else:
        elements += rows * hidden
        total += 16 * rows + 16 * selected * own
    if parallel.tensor_parallel_size > 1 and not parallel.sequence_parallel:  # the norm's output stays as one block
        elements -= (between - own) * hidden
    if model.shared_ffn_size:
        elements += mlp_elements(config, model.shared_ffn_size)
    if model.shared_expert_gate:
        elements += between * (hidden + 1)
        total += 4 * between
    return size * elements + total


def deferred_mlp_elements(config: TrainConfig, width: int) -> int:
    """Count the elements of an MLP of this width between INPUT_GRAD and WEIGHT_GRAD, without its input and output.

    They are the gradient of the activation's input, and the activation or, where ranks make it again, its input.
    """
    ranks = config.parallel.tensor_parallel_size
    _, tokens, _ = element_and_token_sizes(config)
    up = expansion_features(config.model, width, ranks)
    return tokens * (up + (width // ranks if _keeps_activation(config) else up))


def deferred_by_experts(config: TrainConfig) -> int:
    """Compute the bytes of a mixture of experts between INPUT_GRAD and WEIGHT_GRAD; routes are balanced.

    What it keeps for backward stays, with the router's input. Beside it are gradients of the rows after the expansion
    and after the projection. A shared expert has a gathered input, and the gradient of its output if the experts have
    another one.
    """
    model, parallel = config.model, config.parallel
    size, tokens, between = element_and_token_sizes(config)
    ep, etp, own = parallel.expert_parallel_size, parallel.expert_tensor_parallel_size, own_tokens(config)
    rows = model.experts_per_token * own * etp
    if ep * etp == 1:
        results = own
    else:
        results = ep * etp * own if expert_dispatch(config) == "all_gather" else rows
    elements = (between + results) * model.hidden_size + rows * expansion_features(model, model.expert_ffn_size, etp)
    if model.shared_ffn_size:
        shared = deferred_mlp_elements(config, model.shared_ffn_size) - mlp_elements(config, model.shared_ffn_size)
        whole = 2 if parallel.sequence_parallel else int(ep * etp > 1)
        elements += shared + whole * tokens * model.hidden_size
    return size * elements + expert_activations(config)


def element_and_token_sizes(config: TrainConfig) -> tuple[int, int, int]:
    """Return (bytes of an element, tokens of a microbatch, tokens of this rank between tensor-parallel layers)."""
    parallel = config.parallel
    tokens = config.training.microbatch_size * config.most_positions
    own = tokens // parallel.tensor_parallel_size if parallel.sequence_parallel else tokens
    return config.training.element_bytes, tokens, own

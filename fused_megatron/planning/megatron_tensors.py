"""Table of the tensors that Megatron-core keeps from forward for backward, each with its bytes and the reason.

Facts: Megatron-core 0.14 with Transformer Engine layers, read in its source. The table covers Korthikanti et al. 2022
(arXiv:2205.05198), tables 1 and 2: with a fused attention kernel a block of a GPT keeps S B H (10 + 24 / R) bytes, or
34 S B H / R with sequence parallelism, besides statistics of norms and attention.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fused_megatron.config import TrainConfig
from fused_megatron.planning.parameter_counts import expansion_features, vocabulary_elements
from fused_megatron.planning.rank_communication import own_tokens


@dataclass(frozen=True)
class Sizes:
    """Sizes of the tensors of one microbatch on one rank.

    Attributes:
        size: bytes of an element.
        tokens, own: tokens T of the rank; tokens T' between tensor-parallel layers (T / R with sequence parallelism).
        hidden, query, key: features H of the residual stream; of the rank's query heads; of its key heads.
        heads, positions: query heads of the rank; positions S of a sequence.
        up, down: outputs of the up projection of the rank (F', twice F for a gated MLP), inputs of its down projection.
        rows: rows that the experts of the rank compute, with balanced routes: K T / R etp.
        sent_rows: rows that the rank sends to experts: K T / R.
        expert_up, expert_down: up and down of an expert.
        routed: tokens that the rank routes, times the number of experts.
        vocabulary: rows of the vocabulary table on the rank.
        statistics: bytes of a norm's statistics for a token.
    """

    size: int
    tokens: int
    own: int
    hidden: int
    query: int
    key: int
    heads: int
    positions: int
    up: int
    down: int
    rows: int
    sent_rows: int
    expert_up: int
    expert_down: int
    routed: int
    vocabulary: int
    statistics: int


def sizes_of(config: TrainConfig) -> Sizes:
    """Compute the sizes of a config."""
    model, parallel = config.model, config.parallel
    ranks, etp = parallel.tensor_parallel_size, parallel.expert_tensor_parallel_size
    tokens = config.training.microbatch_size * config.most_positions
    routed = own_tokens(config)
    return Sizes(
        size=config.training.element_bytes,
        tokens=tokens,
        own=tokens // ranks if parallel.sequence_parallel else tokens,
        hidden=model.hidden_size,
        query=model.num_heads // ranks * model.head_size,
        key=max(1, model.kv_heads // ranks) * model.head_size,
        heads=model.num_heads // ranks,
        positions=model.seq_len,
        up=expansion_features(model, model.ffn_size, ranks),
        down=model.ffn_size // ranks,
        rows=model.experts_per_token * routed * etp,
        sent_rows=model.experts_per_token * routed,
        expert_up=expansion_features(model, model.expert_ffn_size, etp),
        expert_down=model.expert_ffn_size // etp,
        routed=routed * (model.num_experts or 0),
        vocabulary=vocabulary_elements(model, ranks) // model.hidden_size,
        statistics=4 if model.normalization == "rms_norm" else 8,
    )


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that forward keeps for backward.

    Attributes:
        what: name of the tensor.
        formula: its bytes for a microbatch, as text; e is the bytes of an element.
        why: the reason that backward needs it.
        num_bytes: computes its bytes.
        exists: whether a config keeps it; the second argument is whether attention runs in a fused kernel.
    """

    what: str
    formula: str
    why: str
    num_bytes: Callable[[Sizes], int]
    exists: Callable[[TrainConfig, bool], bool] = lambda config, fused: True


def _keeps_scores(config: TrainConfig, fused: bool) -> bool:
    return not fused and config.model.recompute == "none"


def _drops(config: TrainConfig, fused: bool) -> bool:
    return config.model.hidden_dropout > 0


ATTENTION = (
    KeptTensor("input of the first norm", "e T' H", "backward of the norm", lambda n: n.size * n.own * n.hidden),
    KeptTensor(
        "output of the first norm",
        "e T' H",
        "operand of the weight gradient; sequence parallelism keeps the shard and gathers it again",
        lambda n: n.size * n.own * n.hidden,
    ),
    KeptTensor("statistics of this norm", "8 T'", "mean and deviation, float32", lambda n: n.statistics * n.own),
    KeptTensor(
        "query, key and value",
        "e T (N + 2 G) D / R",
        "backward of attention; one tensor, of which the three are views",
        lambda n: n.size * n.tokens * (n.query + 2 * n.key),
    ),
    KeptTensor(
        "rotated query and key",
        "e T (N + G) D / R",
        "attention keeps the rotated copies; value is a view of the tensor above, which stays",
        lambda n: n.size * n.tokens * (n.query + n.key),
        lambda config, fused: config.model.position == "rotary" or config.model.query_key_norm,
    ),
    KeptTensor(
        "logsumexp of attention",
        "4 T N / R",
        "backward of the fused kernel, which draws the dropout mask again from its seed",
        lambda n: 4 * n.tokens * n.heads,
        lambda config, fused: fused and config.model.recompute != "selective",
    ),
    KeptTensor(
        "probabilities of attention",
        "e T S N / R",
        "without a fused kernel: output of the softmax",
        lambda n: n.size * n.tokens * n.positions * n.heads,
        _keeps_scores,
    ),
    KeptTensor(
        "probabilities after dropout, and its mask",
        "(e + 1) T S N / R",
        "without a fused kernel: operand of the product with value; 1 byte an element of the mask",
        lambda n: (n.size + 1) * n.tokens * n.positions * n.heads,
        lambda config, fused: _keeps_scores(config, fused) and config.model.attention_dropout > 0,
    ),
    KeptTensor(
        "output of attention",
        "e T N D / R",
        "backward of attention, and operand of the weight gradient of the projection",
        lambda n: n.size * n.tokens * n.query,
    ),
    KeptTensor(
        "mask of the dropout after attention",
        "T' H",
        "1 byte an element; ours draws it again from a counter",
        lambda n: n.own * n.hidden,
        _drops,
    ),
    KeptTensor("input of the second norm", "e T' H", "backward of the norm", lambda n: n.size * n.own * n.hidden),
    KeptTensor(
        "output of the second norm",
        "e T' H",
        "operand of the weight gradient, as above",
        lambda n: n.size * n.own * n.hidden,
    ),
    KeptTensor("statistics of the second norm", "8 T'", "as above", lambda n: n.statistics * n.own),
    KeptTensor(
        "mask of the dropout after the MLP",
        "T' H",
        "1 byte an element; ours draws it again from a counter",
        lambda n: n.own * n.hidden,
        _drops,
    ),
)
"""Tensors of every block, besides its MLP or its experts."""
MLP = (
    KeptTensor(
        "input of the activation", "e T F' / R", "backward of the activation", lambda n: n.size * n.tokens * n.up
    ),
    KeptTensor(
        "output of the activation",
        "e T F / R",
        "operand of the weight gradient of the down projection; ours computes it again at R > 1",
        lambda n: n.size * n.tokens * n.down,
    ),
)
"""Tensors of an MLP."""
EXPERTS = (
    KeptTensor(
        "logits, scores and choice of the router",
        "9 T E",
        "two float32 tensors, and 1 byte an element for the choice",
        lambda n: 9 * n.routed,
    ),
    KeptTensor(
        "rows of the experts", "e K T etp H", "operand of the weight gradient", lambda n: n.size * n.rows * n.hidden
    ),
    KeptTensor(
        "segments of rows that arrive",
        "e K T H",
        "with ep > 1 the number of rows changes from block to block and from step to step; rows seldom fit into the "
        "segments of the step before, and the allocator holds them once more",
        lambda n: n.size * n.sent_rows * n.hidden,
        lambda config, fused: config.parallel.expert_parallel_size > 1,
    ),
    KeptTensor(
        "input of the activation",
        "e K T F'",
        "backward of the activation",
        lambda n: n.size * n.rows * n.expert_up,
    ),
    KeptTensor(
        "output of the activation",
        "e K T F",
        "factor of the product with the scores; a gated activation is fused with this product and keeps none",
        lambda n: n.size * n.rows * n.expert_down,
        lambda config, fused: config.model.activation != "swiglu",
    ),
    KeptTensor(
        "weighted output of the activation",
        "e K T F + 4 K T",
        "operand of the weight gradient of the down projection; and the scores, float32",
        lambda n: n.rows * (n.size * n.expert_down + 4),
    ),
)
"""Tensors of a mixture of experts."""
FIRST = (
    KeptTensor("tokens and positions", "16 T", "int64; the gradient of the embedding", lambda n: 16 * n.tokens),
    KeptTensor("mask of the dropout of the embedding", "T' H", "1 byte an element", lambda n: n.own * n.hidden, _drops),
)
"""Tensors of the embedding, on the first stage."""
LAST = (
    KeptTensor("input of the last norm", "e T' H", "backward of the norm", lambda n: n.size * n.own * n.hidden),
    KeptTensor(
        "output of the last norm", "e T' H", "operand of the head's gradient", lambda n: n.size * n.own * n.hidden
    ),
    KeptTensor(
        "softmax of the logits",
        "4 T V / R",
        "float32; backward of cross-entropy",
        lambda n: 4 * n.tokens * n.vocabulary,
    ),
)
"""Tensors of the head and the loss, on the last stage."""


def kept_bytes(table: tuple[KeptTensor, ...], config: TrainConfig, sizes: Sizes, fused: bool) -> int:
    """Sum the bytes of the tensors of a table that a config keeps."""
    return sum(tensor.num_bytes(sizes) for tensor in table if tensor.exists(config, fused))


def block_bytes(config: TrainConfig, sizes: Sizes, has_experts: bool, fused: bool) -> int:
    """Compute the bytes that a block keeps which is not recomputed as a whole."""
    found = kept_bytes(ATTENTION, config, sizes, fused)
    if not has_experts:
        return found + kept_bytes(MLP, config, sizes, fused)
    found += kept_bytes(EXPERTS, config, sizes, fused)
    if config.model.shared_ffn_size:
        up = expansion_features(config.model, config.model.shared_ffn_size, config.parallel.tensor_parallel_size)
        found += sizes.size * sizes.tokens * (up + config.model.shared_ffn_size // config.parallel.tensor_parallel_size)
    return found


def logits_bytes(sizes: Sizes) -> int:
    """Compute the bytes of logits while the loss is computed, besides the softmax: logits in 16 bits, as they came.

    float32 logits are overwritten by their softmax.
    """
    return sizes.size * sizes.tokens * sizes.vocabulary if sizes.size < 4 else 0

"""Counts of the parameters that a rank holds: of a block, of a pipeline stage, of its vocabulary table."""

from dataclasses import dataclass
from math import lcm

from fused_megatron.checks import check
from fused_megatron.config import ParallelConfig, TransformerConfig
from fused_megatron.models import StageSpan


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of parameters on one rank.

    Attributes:
        matrices: of matrices of blocks, which the Muon optimizer updates by its own rule.
        others: norms, biases, vocabulary tables and positions.
        expert_matrices: of matrices of experts. Experts have other replicas than all other parameters.
        expert_others: biases of experts.
    """

    matrices: int = 0
    others: int = 0
    expert_matrices: int = 0
    expert_others: int = 0

    def __add__(self, other: "ParameterCounts") -> "ParameterCounts":
        return ParameterCounts(
            self.matrices + other.matrices,
            self.others + other.others,
            self.expert_matrices + other.expert_matrices,
            self.expert_others + other.expert_others,
        )

    @property
    def dense(self) -> int:
        """Elements that are not of experts."""
        return self.matrices + self.others

    @property
    def experts(self) -> int:
        """Elements of experts."""
        return self.expert_matrices + self.expert_others

    @property
    def total(self) -> int:
        """All elements."""
        return self.dense + self.experts


def stage_parameters(config: TransformerConfig, span: StageSpan, parallel: ParallelConfig) -> ParameterCounts:
    """Count the parameters of a stage on one rank, with the padding of the vocabulary."""
    ranks = parallel.tensor_parallel_size
    norm = _norm(config)
    total = ParameterCounts()
    for block in range(span.start, span.stop):
        total += block_parameters(config, parallel, config.has_experts(block))
    others = 0
    if span.first:
        others += vocabulary_elements(config, ranks)
        others += (config.position == "learned") * config.seq_len * config.hidden_size
    if span.last:
        others += norm
        if not config.tied_embeddings or not span.first:
            others += vocabulary_elements(config, ranks)
    return total + ParameterCounts(others=others)


def block_parameters(config: TransformerConfig, parallel: ParallelConfig, has_experts: bool) -> ParameterCounts:
    """Count the parameters of a block on one of its R tensor-parallel ranks.

    A block with N heads and G key-value heads of size D, F = ffn_hidden_size, and F' = F, or 2 F for a gated MLP, has

        H (N D + 2 max(G, R) D + N D + F' + F) / R     weights
        (F' + (N + 2 max(G, R)) D) / R                 biases that are sharded
        2 H                                            biases that every rank holds
        2 * 2 H (RMS norm: 2 * H)                      norms, which every rank holds

    With E experts of width F, divided over ep expert-parallel and etp expert-tensor-parallel ranks, it has instead of
    the MLP

        E H                                            router, which every rank holds; H more for a gate
        E / ep * H (F' + F) / etp                      weights of experts
        E / ep * (F' / etp + H)                        biases of experts

    and the MLP of the shared experts.
    """
    hidden, ranks = config.hidden_size, parallel.tensor_parallel_size
    query_key_value, query = attention_features(config, ranks)
    qkv_bias = config.linear_biases if config.qkv_bias is None else config.qkv_bias
    matrices = hidden * (query_key_value + query)
    others = 2 * _norm(config) + qkv_bias * query_key_value + config.linear_biases * hidden
    head_norms = 2 * config.head_size
    if config.query_key_norm_over == "all_heads":
        head_norms = (config.num_heads + config.kv_heads) * config.head_size // ranks
    others += config.query_key_norm * head_norms
    if not has_experts:
        mlp = _mlp(config, config.ffn_size, ranks)
        return ParameterCounts(matrices + mlp.matrices, others + mlp.others)
    local = (config.num_experts or 0) // parallel.expert_parallel_size
    expert = _mlp(config, config.expert_ffn_size, parallel.expert_tensor_parallel_size)
    shared = _mlp(config, config.shared_ffn_size, ranks) if config.shared_ffn_size else ParameterCounts()
    matrices += hidden * ((config.num_experts or 0) + config.shared_expert_gate) + shared.matrices
    return ParameterCounts(matrices, others + shared.others, local * expert.matrices, local * expert.others)


def attention_features(config: TransformerConfig, ranks: int) -> tuple[int, int]:
    """Return the outputs of the query-key-value product on a rank, and the inputs of the output projection."""
    query = config.num_heads * config.head_size // ranks
    key_value = 2 * max(1, config.kv_heads // ranks) * config.head_size
    return query + key_value, query


def expansion_features(config: TransformerConfig, width: int, ranks: int) -> int:
    """Return the outputs of the up projection of an MLP on a rank, gate and up together for a gated MLP."""
    return width // ranks * (1 if config.activation.startswith("gelu") else 2)


def vocabulary_elements(config: TransformerConfig, ranks: int) -> int:
    """Count the elements of a rank's shard of the vocabulary table."""
    check(config.vocab_size is not None, "vocab_size=None must be given to know what the embedding holds")
    multiple = lcm(config.pad_vocab_size_to_multiple_of, ranks)
    return -(-(config.vocab_size or 0) // multiple) * multiple // ranks * config.hidden_size


def _mlp(config: TransformerConfig, width: int, ranks: int) -> ParameterCounts:
    expansion = expansion_features(config, width, ranks)
    biases = config.linear_biases * (expansion + config.hidden_size)
    return ParameterCounts(config.hidden_size * (expansion + width // ranks), biases)


def _norm(config: TransformerConfig) -> int:
    return config.hidden_size * (1 if config.normalization == "rms_norm" else 2)

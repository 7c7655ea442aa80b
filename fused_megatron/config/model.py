"""Settings of the model.

The text below a field is its help on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any, Literal

from fused_megatron.checks import InputError, check, check_divisible, check_one_of, check_positive
from fused_megatron.config.expert_checks import check_experts
from fused_megatron.untrusted_files import convert


@dataclass(frozen=True)
class TransformerConfig:
    """Settings that all model families have."""

    family: str = ""
    """Key of MODEL_FAMILIES; each family's config class sets it."""
    num_layers: int = 4
    """Number of transformer blocks."""
    hidden_size: int = 256
    """Width H of the residual stream."""
    num_heads: int = 4
    """Number N of attention (query) heads."""
    head_dim: int | None = None
    """Features D of a head. None: hidden_size / num_heads."""
    seq_len: int = 256
    """Sequence length S of training, and the longest sequence of the model."""
    ffn_hidden_size: int | None = None
    """Width F of the MLP. None: 4 hidden_size."""
    vocab_size: int | None = None
    """Vocabulary entries V, without padding. None: the number of the tokenizer or dataset."""
    tied_embeddings: bool = True
    """Use the weight of the token embedding as the weight of the output head."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in layer norms and to the mean square in RMS norms."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; for output projections, init_std / sqrt(2 num_layers)."""
    pad_vocab_size_to_multiple_of: int = 128
    """Pad the stored vocabulary to a multiple of this and of tensor_parallel_size; the loss ignores the padding."""
    activation: str = "gelu"
    """Activation of the MLP: gelu (tanh), gelu_exact (erf), or gated swiglu or geglu (gate and up weights [F, H])."""
    normalization: str = "layer_norm"
    """layer_norm or rms_norm."""
    position: str = "learned"
    """learned: a table that is added to the embedding; rotary: rotation of queries and keys in every layer."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_fraction: float = 1.0
    """Share of the features of a head that is rotated."""
    rotary_scaling: str = "none"
    """Scaling of the rotary frequencies for a longer context: none, linear, dynamic, llama3 or yarn."""
    rotary_scaling_factor: float = 1.0
    """Longer context / original context; the scaling divides (slow) frequencies by it."""
    rotary_original_seq_len: int | None = None
    """Original context, before scaling; needed for dynamic, llama3 and yarn."""
    rotary_slow_turns: float = 1.0
    """llama3, yarn: frequencies with fewer turns over the original context are scaled in full."""
    rotary_fast_turns: float | None = None
    """llama3, yarn: frequencies with more turns over the original context are not scaled. None: llama3 4, yarn 32."""
    rotary_attention_factor: float | None = None
    """yarn: factor of cos and sin. None: 0.1 ln(rotary_scaling_factor) + 1."""
    num_kv_heads: int | None = None
    """Key-value heads G, each shared by num_heads / num_kv_heads query heads. None: num_heads."""
    linear_biases: bool = True
    """Give the linear layers of attention and MLP a bias."""
    qkv_bias: bool | None = None
    """Give query, key and value a bias, as Qwen2 does. None: linear_biases."""
    query_key_norm: bool = False
    """Apply an RMS norm to each head of queries and keys before rotation, as Qwen3 does."""
    query_key_norm_over: str = "head"
    """Features of one mean square of this norm: head (each head on its own) or all_heads (all heads, as OLMoE)."""
    sliding_window: int | None = None
    """Number of tokens that a token attends to, including itself. None: all earlier tokens and itself."""
    hidden_dropout: float = 0.0
    """Dropout of the outputs of attention and MLP, before they are added to the residual stream."""
    attention_dropout: float = 0.0
    """Dropout of the attention probabilities. Above 0, training computes them in memory, S x S per head, unless
    attention_dropout_kernel is fast."""
    attention_dropout_kernel: str = "exact"
    """exact: the same mask in every parallel layout; fast: the mask of torch's attention kernel, which depends on the
    layout, without S x S tensors on a GPU. Not for sliding windows, packed documents and context parallelism."""
    embedding_dropout: float = 0.0
    """Dropout of the embedded tokens."""
    recompute: str = "none"
    """Recompute in backward: none, selective (attention between its projections), full (a block from its input)."""
    recompute_blocks: int | None = None
    """Recompute only this number of blocks of each pipeline stage, the first ones; keep the rest. None: all."""
    num_experts: int | None = None
    """Mixture of experts: number E of expert MLPs of a block, from which a router selects for each token. None: no
    experts."""
    experts_per_token: int = 2
    """Experts K that compute each token."""
    expert_ffn_hidden_size: int | None = None
    """Width F of an expert. None: ffn_hidden_size."""
    num_shared_experts: int = 0
    """Experts that compute every token, besides the selected ones; together they are one MLP."""
    shared_expert_ffn_size: int | None = None
    """Width of this MLP. None: num_shared_experts x the width of an expert."""
    shared_expert_gate: bool = False
    """Multiply the output of the shared experts by a learned sigmoid gate, as Qwen2-MoE does."""
    moe_every: int = 1
    """Every moe_every-th block has experts: the last one of each moe_every blocks. The others have an MLP."""
    num_dense_layers: int = 0
    """The first num_dense_layers blocks have an MLP and no experts."""
    router_scores: str = "softmax"
    """Scores of the experts: softmax over all experts, or sigmoid of each one (DeepSeek-V3)."""
    router_normalize: bool = True
    """Divide the scores of a token's selected experts by their sum."""
    router_scale: float = 1.0
    """Factor of the scores with which the outputs of the experts are weighted."""
    router_groups: int | None = None
    """Number of groups of neighbouring experts, for group-limited selection (DeepSeek-V3). None: no groups."""
    router_groups_per_token: int | None = None
    """Number of groups from which a token selects its experts: those with the largest sum of their two best scores."""
    router_bias_rate: float | None = None
    """Balance experts without a loss: change a bias, added to the scores in the selection only, by this rate after each
    step, up for experts with fewer tokens than the mean. 0: keep the bias as it is. None: no bias."""
    balance_loss: float = 0.0
    """Coefficient of an auxiliary loss that grows if few experts get most tokens. 0: none. Usual: 0.001 to 0.01."""
    balance_loss_over: str = "sequence"
    """Tokens whose loads the balance loss counts: each sequence on its own, or the whole previous step."""
    router_z_loss: float = 0.0
    """Coefficient of an auxiliary loss that keeps router logits small: logsumexp(logits)^2 (ST-MoE). Usual: 0.001."""
    router_jitter: float = 0.0
    """In training, multiply the router's inputs by random numbers in [1 - router_jitter, 1 + router_jitter)."""
    capacity_factor: float | None = None
    """Drop a sequence's tokens beyond ceil(capacity_factor x K S / E) for an expert, the last ones. None: drop none."""

    def __post_init__(self) -> None:
        check_one_of("family", self.family, list(MODEL_FAMILIES))
        wanted = self.traits.config
        check(
            isinstance(self, wanted), f"family={self.family!r} must be a {wanted.__name__}, not a {type(self).__name__}"
        )
        for name in ("num_layers", "hidden_size", "num_heads", "seq_len", "pad_vocab_size_to_multiple_of", "moe_every"):
            check_positive(name, getattr(self, name))
        for name in _POSITIVE_OR_NONE:
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.head_dim is None:
            check_divisible("hidden_size", self.hidden_size, "num_heads", self.num_heads)
        check_divisible("num_heads", self.num_heads, "num_kv_heads", self.kv_heads)
        for name, allowed in _ALLOWED.items():
            check_one_of(name, getattr(self, name), allowed)
        for name in ("hidden_dropout", "attention_dropout", "embedding_dropout"):
            check(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must lie in [0, 1)")
        check(
            self.attention_dropout_kernel == "exact" or self.sliding_window is None,
            f"attention_dropout_kernel={self.attention_dropout_kernel!r} must be 'exact' with "
            f"sliding_window={self.sliding_window}: torch's kernel has no window",
        )
        check(
            self.recompute_blocks is None or self.recompute != "none",
            f"recompute_blocks={self.recompute_blocks} needs recompute='selective' or 'full'",
        )
        check(self.layer_norm_eps > 0, f"layer_norm_eps={self.layer_norm_eps} must be above 0")
        check(self.init_std > 0, f"init_std={self.init_std} must be above 0")
        self._check_rotary()
        check_experts(self)

    def _check_rotary(self) -> None:
        check(self.rotary_base > 1, f"rotary_base={self.rotary_base} must be above 1")
        check(0 < self.rotary_fraction <= 1, f"rotary_fraction={self.rotary_fraction} must lie in (0, 1]")
        if self.position == "rotary":
            check(
                self.rotary_dim >= 2,
                f"rotary_fraction={self.rotary_fraction} must leave a pair of the {self.head_size} elements of a head "
                f"to rotate (at least {2 / self.head_size:g})",
            )
        scaling, factor = self.rotary_scaling, self.rotary_scaling_factor
        check(factor >= 1, f"rotary_scaling_factor={factor} must be 1 or more")
        check(
            scaling == "none" or self.position == "rotary",
            f"rotary_scaling={scaling!r} needs position='rotary', not position={self.position!r}",
        )
        check(
            scaling in ("none", "linear") or self.rotary_original_seq_len is not None,
            f"rotary_original_seq_len=None must be given with rotary_scaling={scaling!r}: the context trained on "
            f"before scaling",
        )
        check(
            scaling != "dynamic" or self.rotary_dim > 2,
            f"rotary_scaling='dynamic' needs more than the {self.rotary_dim} rotated elements of a head",
        )
        slow, fast = self.rotary_slow_turns, self.fast_turns
        check(0 < slow < fast, f"rotary_slow_turns={slow} must lie between 0 and rotary_fast_turns={fast}")
        attention_factor = self.rotary_attention_factor
        check(
            attention_factor is None or attention_factor > 0,
            f"rotary_attention_factor={attention_factor} must be above 0",
        )

    @property
    def traits(self) -> ModelFamily:
        """The row of MODEL_FAMILIES."""
        return MODEL_FAMILIES[self.family]

    @property
    def feed_forward(self) -> str:
        """Key of the feed-forward of a block without experts in FEED_FORWARDS of models/feed_forward.py."""
        return "mlp"

    def has_experts(self, block: int) -> bool:
        """Whether this block of the model, counted from 0, has experts."""
        return self.num_experts is not None and block >= self.num_dense_layers and (block + 1) % self.moe_every == 0

    @property
    def expert_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks with experts."""
        return tuple(self.expert_blocks_of(0, self.num_layers))

    def expert_blocks_of(self, start: int, stop: int) -> range:
        """Return the indices from start to stop of the blocks with experts."""
        if self.num_experts is None:
            return range(0)
        start = max(start, self.num_dense_layers)
        return range(start + (-start - 1) % self.moe_every, stop, self.moe_every)

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether a feed-forward may return an auxiliary loss in training."""
        return self.num_experts is not None and max(self.balance_loss, self.router_z_loss) > 0

    @property
    def expert_ffn_size(self) -> int:
        """expert_ffn_hidden_size, or its default."""
        return self.ffn_size if self.expert_ffn_hidden_size is None else self.expert_ffn_hidden_size

    @property
    def shared_ffn_size(self) -> int:
        """Width of the MLP of all shared experts; 0 without shared experts."""
        if self.shared_expert_ffn_size is not None and self.num_shared_experts:
            return self.shared_expert_ffn_size
        return self.num_shared_experts * self.expert_ffn_size

    def slots(self, seq_len: int) -> int | None:
        """Largest number of tokens of a sequence that an expert takes; None: any number."""
        if self.capacity_factor is None or self.num_experts is None:
            return None
        return ceil(self.capacity_factor * self.experts_per_token * seq_len / self.num_experts)

    @property
    def ffn_size(self) -> int:
        """ffn_hidden_size (F), or its default."""
        return 4 * self.hidden_size if self.ffn_hidden_size is None else self.ffn_hidden_size

    @property
    def kv_heads(self) -> int:
        """num_kv_heads, or its default."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """head_dim, or its default."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def output_init_std(self) -> float:
        """Initial standard deviation of output projections. The residual stream sums 2 num_layers of their outputs."""
        return self.init_std / (2 * self.num_layers) ** 0.5

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated: rotary_fraction of them, rounded down to an even number."""
        return int(self.head_size * self.rotary_fraction) // 2 * 2

    def recomputed_blocks(self, num_blocks: int) -> int:
        """Return how many blocks, the first ones, a pipeline stage with num_blocks recomputes."""
        if self.recompute == "none":
            return 0
        return num_blocks if self.recompute_blocks is None else min(num_blocks, self.recompute_blocks)

    @property
    def fast_turns(self) -> float:
        """rotary_fast_turns, or its default."""
        if self.rotary_fast_turns is not None:
            return self.rotary_fast_turns
        return 32.0 if self.rotary_scaling == "yarn" else 4.0

    @property
    def stores_scores(self) -> bool:
        """Whether attention of whole sequences stores its scores, for dropout that is the same in every layout.

        The fast kernel stores none on a GPU; on a CPU torch computes attention with dropout from stored scores.
        """
        return self.attention_dropout > 0 and self.attention_dropout_kernel == "exact"

    @property
    def has_dropout(self) -> bool:
        """Whether training draws random numbers: dropout, or noise in the inputs of routers."""
        jitter = 0.0 if self.num_experts is None else self.router_jitter
        return max(self.hidden_dropout, self.attention_dropout, self.embedding_dropout, jitter) > 0

    def trainable(self) -> TransformerConfig:
        """Return the config of this model without the parts that `fused-megatron train` cannot train."""
        return self

    def check_trainable(self) -> None:
        """Raise InputError if the model has parts that `fused-megatron train` cannot train."""


@dataclass(frozen=True)
class GPTConfig(TransformerConfig):
    """GPT with pre-norm blocks. The defaults are GPT-2's; set activation, normalization, position, linear_biases and
    num_kv_heads for a Llama, Mistral or Qwen."""

    family: str = "gpt"
    """gpt, a decoder; or bert, an encoder that predicts masked tokens (keys: train --help --model.family=bert)."""


@dataclass(frozen=True)
class BERTConfig(TransformerConfig):
    """BERT, an encoder: every token attends to every token. The output head is tied to the embedding."""

    family: str = "bert"
    """bert, an encoder; or gpt, a decoder."""
    num_token_types: int = 2
    """Token types (first and second sentence), each with a learned embedding. 0: none."""
    post_norm: bool = False
    """True: norms after residual additions and embedding (as published). False: before attention, MLP and head
    (as in Megatron-LM)."""
    masked_lm_head: bool = True
    """Have the head that predicts masked tokens."""
    next_sentence_head: bool = False
    """Have the head that predicts whether the second sentence follows the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_token_types >= 0, f"num_token_types={self.num_token_types} must be 0 or more")
        check_one_of("activation", self.activation, ("gelu", "gelu_exact"))
        check(self.tied_embeddings, "tied_embeddings=False must be True: BERT's head shares the embedding")
        check(self.sliding_window is None, f"sliding_window={self.sliding_window} must be None: it is of causal models")

    def trainable(self) -> BERTConfig:
        """Return the config without the next-sentence head, for which there is no training data."""
        return replace(self, next_sentence_head=False)

    def check_trainable(self) -> None:
        """Raise InputError unless the masked-LM head is the only head."""
        for name, wanted in (("masked_lm_head", True), ("next_sentence_head", False)):
            check(
                getattr(self, name) == wanted,
                f"model.{name}={not wanted} must be {wanted}: train teaches a BERT only to predict masked tokens "
                f"(for other heads use fused_megatron.models.BERT in a loop of your own)",
            )


@dataclass(frozen=True)
class ModelFamily:
    """Description of a model family for configs, training data and commands.

    Attributes:
        config: its config class.
        predicts: its training targets: the next token at each position, or masked tokens (data/masked_lm.py).
        generates: whether `generate` can continue a text with it.
    """

    config: type[TransformerConfig]
    predicts: Literal["next_token", "masked_tokens"]
    generates: bool


# The models that model.family names; models/registry.py has their classes.
MODEL_FAMILIES: dict[str, ModelFamily] = {
    "gpt": ModelFamily(GPTConfig, predicts="next_token", generates=True),
    "bert": ModelFamily(BERTConfig, predicts="masked_tokens", generates=False),
}


def model_config(values: Mapping[str, Any]) -> TransformerConfig:
    """Return the model config with these fields (as dataclasses.asdict returns them); the default family is gpt.

    Raises:
        InputError: a field is unknown, or a value has the wrong type.
    """
    family = values.get("family", "gpt")
    check_one_of("family", family, list(MODEL_FAMILIES))
    known = {field.name for field in fields(MODEL_FAMILIES[family].config)}
    if unknown := sorted(values.keys() - known):
        raise InputError(f"{unknown[0]} is no field of a model of family={family!r} (another release wrote it)")
    return convert(dict(values), MODEL_FAMILIES[family].config)


# Fields that must be positive if they are not None.
_POSITIVE_OR_NONE = (
    "ffn_hidden_size",
    "vocab_size",
    "num_kv_heads",
    "head_dim",
    "sliding_window",
    "rotary_original_seq_len",
    "recompute_blocks",
    "num_experts",
    "expert_ffn_hidden_size",
    "shared_expert_ffn_size",
    "router_groups",
    "router_groups_per_token",
)
# Allowed values of the fields that hold a name.
_ALLOWED = {
    "activation": ("gelu", "swiglu", "geglu", "gelu_exact"),
    "normalization": ("layer_norm", "rms_norm"),
    "position": ("learned", "rotary"),
    "rotary_scaling": ("none", "linear", "dynamic", "llama3", "yarn"),
    "query_key_norm_over": ("head", "all_heads"),
    "attention_dropout_kernel": ("exact", "fast"),
    "recompute": ("none", "selective", "full"),
    "router_scores": ("softmax", "sigmoid"),
    "balance_loss_over": ("sequence", "step"),
}

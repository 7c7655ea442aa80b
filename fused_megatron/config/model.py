"""Settings of the model.

The text under a field is its help on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from fused_megatron.checks import InputError, check, check_divisible, check_one_of, check_positive
from fused_megatron.untrusted_files import convert


@dataclass(frozen=True)
class TransformerConfig:
    """The settings that every family of models has."""

    family: str = ""
    """Of MODEL_FAMILIES; every family has its own default."""
    num_layers: int = 4
    """Number of transformer blocks."""
    hidden_size: int = 256
    """Width H of the residual stream."""
    num_heads: int = 4
    """Attention heads N."""
    head_dim: int | None = None
    """Elements of a head; hidden_size / num_heads when not given."""
    seq_len: int = 256
    """Longest sequence S, and the length trained on."""
    ffn_hidden_size: int | None = None
    """Width F of the MLP; 4 H when not given."""
    vocab_size: int | None = None
    """True vocabulary V; taken from the tokenizer or dataset when not given."""
    tied_embeddings: bool = True
    """The output head shares the weight of the token embedding."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every layer norm, to the mean square in every RMS norm."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections take init_std / sqrt(2 num_layers)."""
    pad_vocab_size_to_multiple_of: int = 128
    """The stored vocabulary is padded to a multiple of this and of the tensor-parallel size; the padding takes no part
    in the loss."""
    activation: str = "gelu"
    """Of the MLP: gelu (tanh), gelu_exact (erf), or the gated swiglu or geglu, whose gate and up weights are F x H."""
    normalization: str = "layer_norm"
    """layer_norm or rms_norm."""
    position: str = "learned"
    """learned: a table that is added to the embedding; rotary: queries and keys are rotated in every layer."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_fraction: float = 1.0
    """Share of every head that is rotated."""
    rotary_scaling: str = "none"
    """How a longer context than trained on is rotated: none, linear, dynamic, llama3 or yarn."""
    rotary_scaling_factor: float = 1.0
    """How many times longer: what the scaling divides (slow) frequencies by."""
    rotary_original_seq_len: int | None = None
    """Context trained on before scaling, for dynamic, llama3 and yarn."""
    rotary_slow_turns: float = 1.0
    """llama3 and yarn: frequencies that turn less often than this over the original context are scaled wholly."""
    rotary_fast_turns: float | None = None
    """llama3 and yarn: frequencies that turn more often are not; 4 for llama3 and 32 for yarn when not given."""
    rotary_attention_factor: float | None = None
    """yarn: what cos and sin are multiplied by; 0.1 ln(rotary_scaling_factor) + 1 when not given."""
    num_kv_heads: int | None = None
    """Heads of keys and values, each shared by num_heads / num_kv_heads query heads; num_heads when not given."""
    linear_biases: bool = True
    """Whether the linear layers of attention and MLP have biases."""
    qkv_bias: bool | None = None
    """The same for query, key and value alone (Qwen2); as linear_biases when not given."""
    query_key_norm: bool = False
    """Every head of queries and keys is RMS-normalized before it is rotated (Qwen3)."""
    sliding_window: int | None = None
    """Tokens that a token sees, itself among them; all before it when not given."""
    hidden_dropout: float = 0.0
    """Probability of dropping an element of what attention and MLP add to the residual stream."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention probability; above 0 training computes them whole, S x S a head."""
    embedding_dropout: float = 0.0
    """Probability of dropping an element of the embedded tokens."""
    recompute: str = "none"
    """What backward computes again instead of keeping it: none, selective (the attention between its projections) or
    full (every block; its input alone is kept)."""

    def __post_init__(self) -> None:
        check_one_of("family", self.family, list(MODEL_FAMILIES))
        wanted = self.traits.config
        check(
            isinstance(self, wanted), f"family={self.family!r} must be a {wanted.__name__}, not a {type(self).__name__}"
        )
        for name in ("num_layers", "hidden_size", "num_heads", "seq_len", "pad_vocab_size_to_multiple_of"):
            check_positive(name, getattr(self, name))
        for name in (
            "ffn_hidden_size", "vocab_size", "num_kv_heads", "head_dim", "sliding_window", "rotary_original_seq_len",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.head_dim is None:
            check_divisible("hidden_size", self.hidden_size, "num_heads", self.num_heads)
        check_divisible("num_heads", self.num_heads, "num_kv_heads", self.kv_heads)
        for name, allowed in _WORDS.items():
            check_one_of(name, getattr(self, name), allowed)
        for name in ("hidden_dropout", "attention_dropout", "embedding_dropout"):
            check(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must lie in [0, 1)")
        check(self.layer_norm_eps > 0, f"layer_norm_eps={self.layer_norm_eps} must be above 0")
        check(self.init_std > 0, f"init_std={self.init_std} must be above 0")
        self._check_rotary()

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
        """What is known of its family."""
        return MODEL_FAMILIES[self.family]

    @property
    def feed_forward(self) -> str:
        """What a block's feed-forward is, by its name in models/feed_forward.py."""
        return "mlp"

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether the feed-forward returns an auxiliary loss in training."""
        return False

    @property
    def ffn_size(self) -> int:
        """F, with its default."""
        return 4 * self.hidden_size if self.ffn_hidden_size is None else self.ffn_hidden_size

    @property
    def kv_heads(self) -> int:
        """num_kv_heads, with its default."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """head_dim, with its default."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def output_init_std(self) -> float:
        """Of the output projections: the residual stream sums 2 num_layers outputs, and so its variance is kept."""
        return self.init_std / (2 * self.num_layers) ** 0.5

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that are rotated: rotary_fraction of them, in whole pairs."""
        return int(self.head_size * self.rotary_fraction) // 2 * 2

    @property
    def fast_turns(self) -> float:
        """rotary_fast_turns, with its default."""
        if self.rotary_fast_turns is not None:
            return self.rotary_fast_turns
        return 32.0 if self.rotary_scaling == "yarn" else 4.0

    @property
    def has_dropout(self) -> bool:
        """Whether anything is dropped in training."""
        return max(self.hidden_dropout, self.attention_dropout, self.embedding_dropout) > 0

    def trainable(self) -> TransformerConfig:
        """The same model without what `fused-megatron train` does not train."""
        return self

    def check_trainable(self) -> None:
        """Raise InputError unless `fused-megatron train` trains all of the model."""


@dataclass(frozen=True)
class GPTConfig(TransformerConfig):
    """A GPT of pre-norm blocks; the defaults are those of GPT-2, and activation, normalization, position, linear_biases
    and num_kv_heads make a Llama, Mistral or Qwen of it."""

    family: str = "gpt"
    """gpt; or bert, an encoder that learns to predict masked tokens (its keys: train --help --model.family=bert)."""


@dataclass(frozen=True)
class BERTConfig(TransformerConfig):
    """An encoder: every token sees every other. Fields mean what they do in a GPTConfig; the head is tied."""

    family: str = "bert"
    """bert; or gpt, a decoder."""
    num_token_types: int = 2
    """Kinds of tokens (first and second sentence), each with a learned vector; 0 for none."""
    post_norm: bool = False
    """Norms behind the residual additions and behind the embedding, as BERT was published; else before attention and
    MLP and before the head, as Megatron-LM re-arranged them."""
    masked_lm_head: bool = True
    """Whether there is the head that predicts masked tokens."""
    next_sentence_head: bool = False
    """Whether there is the head that tells if the second sentence follows the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_token_types >= 0, f"num_token_types={self.num_token_types} must be 0 or more")
        check_one_of("activation", self.activation, ("gelu", "gelu_exact"))
        check(self.tied_embeddings, "tied_embeddings=False must be True: BERT's head shares the embedding")
        check(self.sliding_window is None, f"sliding_window={self.sliding_window} must be None: it is of causal models")

    def trainable(self) -> BERTConfig:
        """Without the next-sentence head, for which there is no training data."""
        return replace(self, next_sentence_head=False)

    def check_trainable(self) -> None:
        """Only the masked-LM head is trained."""
        for name, wanted in (("masked_lm_head", True), ("next_sentence_head", False)):
            check(
                getattr(self, name) == wanted,
                f"model.{name}={not wanted} must be {wanted}: train teaches a BERT to predict masked tokens alone "
                f"(a BERT with other heads is fused_megatron.models.BERT in a loop of your own)",
            )


@dataclass(frozen=True)
class ModelFamily:
    """What configs, training data and commands must know of a family of models.

    Attributes:
        config: its settings.
        predicts: what it is trained on: the token after each (the text as it is), or the tokens that are masked
            (data/masked_lm.py).
        generates: whether it can continue a text.
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
    """The model of these fields, as dataclasses.asdict gives them; without a family it is a GPT.

    Raises:
        InputError: an unknown field, or a value of another type.
    """
    family = values.get("family", "gpt")
    check_one_of("family", family, list(MODEL_FAMILIES))
    known = {field.name for field in fields(MODEL_FAMILIES[family].config)}
    if unknown := sorted(values.keys() - known):
        raise InputError(f"{unknown[0]} is no field of a model of family={family!r} (another release wrote it)")
    return convert(dict(values), MODEL_FAMILIES[family].config)


# The values of the fields that are words.
_WORDS = {
    "activation": ("gelu", "swiglu", "geglu", "gelu_exact"),
    "normalization": ("layer_norm", "rms_norm"),
    "position": ("learned", "rotary"),
    "rotary_scaling": ("none", "linear", "dynamic", "llama3", "yarn"),
    "recompute": ("none", "selective", "full"),
}

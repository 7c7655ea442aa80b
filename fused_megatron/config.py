"""Every setting of a run: frozen dataclasses that validate themselves.

The text under a field is its help on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fused_megatron.checks import check, check_divisible, check_multiple_or_divisor, check_one_of


@dataclass(frozen=True)
class GPTConfig:
    """A GPT of pre-norm blocks; the defaults are those of GPT-2, and activation, normalization, position, linear_biases
    and num_kv_heads make a Llama, Mistral or Qwen of it."""

    family: str = "gpt"
    """gpt; or bert, an encoder that learns to predict masked tokens (its keys: train --help --model.family=bert)."""
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
        wanted = MODEL_FAMILIES[self.family]
        check(type(self) is wanted, f"family={self.family!r} must be a {wanted.__name__}, not a {type(self).__name__}")
        for name in ("num_layers", "hidden_size", "num_heads", "seq_len", "pad_vocab_size_to_multiple_of"):
            _check_positive(name, getattr(self, name))
        for name in (
            "ffn_hidden_size", "vocab_size", "num_kv_heads", "head_dim", "sliding_window", "rotary_original_seq_len",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
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


@dataclass(frozen=True)
class BERTConfig(GPTConfig):
    """An encoder: every token sees every other. The fields of GPTConfig mean the same here; the head is tied."""

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


# The models that model.family names.
MODEL_FAMILIES: dict[str, type[GPTConfig]] = {"gpt": GPTConfig, "bert": BERTConfig}


def model_config(fields: Mapping[str, Any]) -> GPTConfig:
    """The model of these fields, as dataclasses.asdict gives them; without a family it is a GPT."""
    return MODEL_FAMILIES[fields.get("family", "gpt")](**fields)


# The values of the fields that are words.
_WORDS = {
    "activation": ("gelu", "swiglu", "geglu", "gelu_exact"),
    "normalization": ("layer_norm", "rms_norm"),
    "position": ("learned", "rotary"),
    "rotary_scaling": ("none", "linear", "dynamic", "llama3", "yarn"),
    "recompute": ("none", "selective", "full"),
}


@dataclass(frozen=True)
class ParallelConfig:
    """The layout over ranks: the product of the three sizes is the world size."""

    tensor_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_parallel_size: int = 1
    """Ranks that share the depth."""
    stages_per_rank: int | None = None
    """Pieces of the depth that each pipeline rank holds; as few as the schedule allows when not given."""
    schedule: str | None = None
    """Of the pipeline, as `fused-megatron schedule` names them; 1f1b, or interleaved_1f1b for several stages per rank,
    when not given."""
    pipeline_cut: tuple[int, ...] | None = None
    """Blocks of each stage; ranks of about equal cost when not given."""
    data_parallel_size: int | None = None
    """Replicas; what is left of the world when not given."""
    sequence_parallel: bool = False
    """Split activations between the tensor-parallel layers over the sequence."""
    timeout_s: float = 120.0
    """Seconds without an answer from another rank before the run ends with an error."""

    def __post_init__(self) -> None:
        _check_positive("tensor_parallel_size", self.tensor_parallel_size)
        _check_positive("pipeline_parallel_size", self.pipeline_parallel_size)
        for name in ("stages_per_rank", "data_parallel_size"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        check(self.timeout_s > 0, f"timeout_s={self.timeout_s} must be above 0")


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from."""

    path: str | None = None
    """Text, a folder of text, .jsonl (field `text`) or an indexed dataset; the Python standard library's sources when
    not given."""
    cache_folder: str | None = None
    """Where tokenizers and token files are cached; ~/.cache/fused_megatron (or $XDG_CACHE_HOME) when not given."""
    tokenizer_vocab_size: int = 8192
    """Entries of the byte-level BPE that is trained on the text."""
    tokenizer_path: str | None = None
    """A tokenizer.json to use instead of training one; for an indexed dataset the one that made it."""
    validation_fraction: float = 0.05
    """Share of the documents held out."""
    mask_fraction: float = 0.15
    """Share of the tokens that a BERT is to predict."""

    def __post_init__(self) -> None:
        _check_positive("tokenizer_vocab_size", self.tokenizer_vocab_size)
        check(0 < self.mask_fraction <= 1, f"mask_fraction={self.mask_fraction} must be above 0 and at most 1")
        check(
            0 < self.validation_fraction <= 0.5,
            f"validation_fraction={self.validation_fraction} must be above 0 and at most 0.5",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under a cosine schedule with warm-up."""

    lr: float = 1e-3
    """Highest learning rate."""
    min_lr: float = 1e-4
    """Learning rate at the last step."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors (biases, norms) have none."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global 2-norm; 0 leaves them alone."""

    def __post_init__(self) -> None:
        check(self.lr > 0, f"lr={self.lr} must be above 0")
        check(0 <= self.min_lr <= self.lr, f"min_lr={self.min_lr} must lie between 0 and lr={self.lr}")
        check(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must be 0 or more")
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must lie in [0, 1)")
        check(self.eps > 0, f"eps={self.eps} must be above 0")
        check(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must be 0 or more")
        check(self.clip_norm >= 0, f"clip_norm={self.clip_norm} must be 0 or more")


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    num_steps: int = 300
    """Optimizer steps of the whole run."""
    global_batch_size: int = 16
    """Sequences a step, over all data-parallel ranks and microbatches."""
    microbatch_size: int = 16
    """Sequences a rank works on at once; gradients accumulate over microbatches."""
    dtype: str = "float32"
    """Weights and activations: float32, or bfloat16 with fp32 main weights and gradients."""
    seed: int = 1234
    """Seed of the weights and of the order of the data."""
    run_folder: str | None = None
    """Where config, metrics, loss.png and checkpoints go; runs/<name of the config file> when not given."""
    eval_interval: int = 100
    """Steps between validations."""
    eval_batches: int = 8
    """Global batches of held-out text a validation reads (fewer if there are fewer)."""
    log_interval: int = 10
    """Steps between lines where the output is no terminal."""
    checkpoint_interval: int = 100
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: int = 2
    """Good checkpoints kept; older ones are removed."""
    tensorboard: bool = False
    """Also write the metrics as TensorBoard events (pip install 'fused-megatron[tensorboard]')."""
    bucket_mb: float = 25.0
    """Size of the gradient buckets that data-parallel ranks reduce while backward goes on, in MB of 10^6 bytes."""

    def __post_init__(self) -> None:
        for name in (
            "num_steps", "global_batch_size", "microbatch_size", "eval_interval", "eval_batches", "log_interval",
            "checkpoint_interval", "keep_checkpoints",
        ):  # fmt: skip
            _check_positive(name, getattr(self, name))
        check(
            self.dtype in ("float32", "bfloat16"),
            f"dtype={self.dtype!r} must be 'float32' or 'bfloat16'",
        )
        check(self.seed >= 0, f"seed={self.seed} must be 0 or more")
        check(self.bucket_mb > 0, f"bucket_mb={self.bucket_mb} must be above 0")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `fused-megatron train` reads: one section of the TOML file per field."""

    model: GPTConfig = field(default_factory=GPTConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        tp = self.parallel.tensor_parallel_size
        check_divisible("num_heads", self.model.num_heads, "tensor_parallel_size", tp)
        check_multiple_or_divisor("num_kv_heads", self.model.kv_heads, "tensor_parallel_size", tp)
        check_divisible("ffn_hidden_size", self.model.ffn_size, "tensor_parallel_size", tp)
        if self.parallel.sequence_parallel:
            check_divisible("seq_len", self.model.seq_len, "tensor_parallel_size", tp)
        check(
            self.model.family != "bert" or self.model.seq_len >= 3,
            f"seq_len={self.model.seq_len} must be at least 3: [CLS], a token and [SEP]",
        )
        check_divisible(
            "global_batch_size", self.training.global_batch_size, "microbatch_size", self.training.microbatch_size
        )

    def check_data_parallel(self, dp_size: int) -> None:
        """Raise unless the global batch splits into whole microbatches on dp_size replicas."""
        check_divisible(
            "global_batch_size",
            self.training.global_batch_size,
            f"microbatch_size={self.training.microbatch_size} x data_parallel_size={dp_size}, i.e. by their product",
            self.training.microbatch_size * dp_size,
        )


@dataclass(frozen=True)
class BERTTrainConfig(TrainConfig):
    """The same where model.family is bert: its [model] has more fields."""

    model: BERTConfig = field(default_factory=BERTConfig)


# What a file or a command line is read as, by its model.family.
TRAIN_CONFIGS: dict[str, type[TrainConfig]] = {"gpt": TrainConfig, "bert": BERTTrainConfig}


def _check_positive(name: str, value: int) -> None:
    check(value >= 1, f"{name}={value} must be 1 or more")

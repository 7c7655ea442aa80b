"""The model families: how each writes its config.json and names its tensors, beside what they are here."""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fused_megatron.checks import InputError
from fused_megatron.config import BERTConfig, GPTConfig
from fused_megatron.training.hugging_face.rotary import read_rotary, write_rotary
from fused_megatron.training.hugging_face.rules import Rule, linear, query_key_value
from fused_megatron.training.hugging_face.settings import Settings

# Fields that say how a model is trained, not what it computes.
_FREE = {
    "init_std",
    "hidden_dropout",
    "attention_dropout",
    "embedding_dropout",
    "recompute",
    "pad_vocab_size_to_multiple_of",
}
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
_GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact"}


@dataclass(frozen=True)
class Family:
    """A family of transformers' models.

    Attributes:
        model_type: in config.json.
        architectures: the classes of the model; first the one with its head.
        prefix: of the names of all tensors but the head; a checkpoint of the bare model lacks it.
        read: config.json to the fields of config_type.
        write: the reverse; what it cannot say is found by reading it back. None: it is not written.
        rules: of the tensors, for a config and a prefix.
        config_type: of the model here.
    """

    model_type: str
    architectures: tuple[str, ...]
    prefix: str
    read: Callable[[Settings], dict[str, Any]]
    write: Callable[[GPTConfig], dict[str, Any]] | None
    rules: Callable[[Any, str], list[Rule]]
    config_type: type[GPTConfig] = GPTConfig

    @property
    def architecture(self) -> str:
        """The class that holds the head, too."""
        return self.architectures[0]

    def read_config(self, settings: Settings) -> GPTConfig:
        """The model that config.json describes.

        Raises:
            InputError: a field that is missing or malformed, or a feature that our models do not have.
        """
        settings.require("quantization_config", None, [None])
        settings.require("add_cross_attention", False, [False])
        try:
            return self.config_type(**self.read(settings))
        except InputError as error:
            source = "" if str(error).startswith(settings.source) else f"{settings.source}: "
            raise InputError(f"{source}{error}") from None

    def write_config(self, config: GPTConfig) -> dict[str, Any]:
        """config.json of the model."""
        assert self.write is not None
        common = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "vocab_size": config.vocab_size,
            "initializer_range": config.init_std,
            "tie_word_embeddings": config.tied_embeddings,
        }
        return common | self.write(config)

    def prefix_in(self, names: Iterable[str]) -> str:
        """The prefix of these tensors: the family's, or none in a checkpoint of the bare model."""
        return self.prefix if any(name.startswith(self.prefix) for name in names) else ""


# What old versions wrote beside the weights.
_BUFFERS = ("*.attn.bias", "*.attn.masked_bias", "*.rotary_emb.inv_freq", "*.embeddings.position_ids")


def is_buffer(name: str) -> bool:
    """Whether a tensor of theirs is no weight."""
    return any(fnmatch.fnmatchcase(f".{name}", pattern) for pattern in _BUFFERS)


def _read_gpt2(settings: Settings) -> dict[str, Any]:
    settings.require("scale_attn_weights", True, [True])
    settings.require("scale_attn_by_inverse_layer_idx", False, [False])
    return {
        "num_layers": settings.size("n_layer"),
        "hidden_size": settings.size("n_embd"),
        "num_heads": settings.size("n_head"),
        "seq_len": settings.size("n_positions"),
        "ffn_hidden_size": settings.size("n_inner", None),
        "vocab_size": settings.size("vocab_size"),
        "tied_embeddings": settings.flag("tie_word_embeddings", True),
        "activation": settings.word("activation_function", _GELUS, "gelu_new"),
        "layer_norm_eps": settings.number("layer_norm_epsilon", 1e-5),
        "init_std": settings.number("initializer_range", 0.02),
        "hidden_dropout": settings.number("resid_pdrop", 0.1),
        "attention_dropout": settings.number("attn_pdrop", 0.1),
        "embedding_dropout": settings.number("embd_pdrop", 0.1),
    }


def _write_gpt2(config: GPTConfig) -> dict[str, Any]:
    return {
        "n_layer": config.num_layers,
        "n_embd": config.hidden_size,
        "n_head": config.num_heads,
        "n_positions": config.seq_len,
        "n_inner": config.ffn_hidden_size,
        "activation_function": "gelu" if config.activation == "gelu_exact" else "gelu_new",
        "layer_norm_epsilon": config.layer_norm_eps,
        "resid_pdrop": config.hidden_dropout,
        "attn_pdrop": config.attention_dropout,
        "embd_pdrop": config.embedding_dropout,
    }


def _gpt2_rules(config: GPTConfig, prefix: str) -> list[Rule]:
    heads = config.num_heads
    rules = [
        Rule("token_embedding.weight", (f"{prefix}wte.weight",)),
        Rule("position_embedding", (f"{prefix}wpe.weight",)),
    ]
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"{prefix}h.{i}"
        rules += [
            *linear(f"{ours}.attention_norm", f"{theirs}.ln_1", True),
            *linear(f"{ours}.attention.query_key_value", f"{theirs}.attn.c_attn", True, transposed=True, heads=heads),
            *linear(f"{ours}.attention.projection", f"{theirs}.attn.c_proj", True, transposed=True),
            *linear(f"{ours}.mlp_norm", f"{theirs}.ln_2", True),
            *linear(f"{ours}.mlp.expansion", f"{theirs}.mlp.c_fc", True, transposed=True),
            *linear(f"{ours}.mlp.projection", f"{theirs}.mlp.c_proj", True, transposed=True),
        ]  # fmt: skip
    return rules + linear("final_norm", f"{prefix}ln_f", True) + _head(config)


def _head(config: GPTConfig) -> list[Rule]:
    return [] if config.tied_embeddings else [Rule("head.weight", ("lm_head.weight",))]


def _read_llama_like(settings: Settings) -> dict[str, Any]:
    heads, hidden = settings.size("num_attention_heads"), settings.size("hidden_size")
    kv_heads = settings.size("num_key_value_heads", heads)
    return {
        "num_layers": settings.size("num_hidden_layers"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "head_dim": settings.size("head_dim", None),
        "ffn_hidden_size": settings.size("intermediate_size"),
        "vocab_size": settings.size("vocab_size"),
        "tied_embeddings": settings.flag("tie_word_embeddings", False),
        "activation": settings.word("hidden_act", _GATED, "silu"),
        "normalization": "rms_norm",
        "layer_norm_eps": settings.number("rms_norm_eps", 1e-6),
        "linear_biases": False,
        "init_std": settings.number("initializer_range", 0.02),
        "attention_dropout": settings.number("attention_dropout", 0.0),
        **read_rotary(settings),
    }


def _read_llama(settings: Settings) -> dict[str, Any]:
    biases = settings.flag("attention_bias", False)
    settings.require("mlp_bias", False, [biases])
    return _read_llama_like(settings) | {"linear_biases": biases}


def _read_mistral(settings: Settings) -> dict[str, Any]:
    # A window that is absent is the first release's; null says that there is none.
    window = settings.size("sliding_window", 4096 if "sliding_window" not in settings.values else None)
    return _read_llama_like(settings) | {"sliding_window": window}


def _read_qwen2(settings: Settings) -> dict[str, Any]:
    return _read_llama_like(settings) | {"qkv_bias": True, "sliding_window": _qwen_window(settings)}


def _read_qwen3(settings: Settings) -> dict[str, Any]:
    settings.require("attention_bias", False, [False])
    fields = _read_llama_like(settings) | {"query_key_norm": True, "sliding_window": _qwen_window(settings)}
    return fields | {"head_dim": settings.size("head_dim", 128)}


def _qwen_window(settings: Settings) -> int | None:
    """The window, where all layers have one; None where none has."""
    window = settings.size("sliding_window", 4096)
    if not settings.flag("use_sliding_window", False):
        return None
    layers, first = settings.size("num_hidden_layers"), settings.get("max_window_layers", 28)
    kinds = settings.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    if len(set(kinds)) > 1:
        raise settings.unsupported("layer_types", kinds, ["one for all layers"])
    return int(window) if kinds[0] == "sliding_attention" else None


def _write_llama_like(config: GPTConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn_size,
        "hidden_act": "gelu_pytorch_tanh" if config.activation == "geglu" else "silu",
        "rms_norm_eps": config.layer_norm_eps,
        "attention_dropout": config.attention_dropout,
        **write_rotary(config),
    }


def _write_llama(config: GPTConfig) -> dict[str, Any]:
    return _write_llama_like(config) | {"attention_bias": config.linear_biases, "mlp_bias": config.linear_biases}


def _write_mistral(config: GPTConfig) -> dict[str, Any]:
    return _write_llama_like(config) | {"sliding_window": config.sliding_window}


def _write_qwen(config: GPTConfig) -> dict[str, Any]:
    window = config.sliding_window
    sliding = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    return _write_llama_like(config) | sliding | {"attention_bias": False}


def _llama_rules(config: GPTConfig, prefix: str) -> list[Rule]:
    qkv_bias = config.linear_biases if config.qkv_bias is None else config.qkv_bias
    rules = [Rule("token_embedding.weight", (f"{prefix}embed_tokens.weight",))]
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"{prefix}layers.{i}"
        attention = [f"{theirs}.self_attn.{kind}_proj" for kind in "qkv"]
        rules += [
            *linear(f"{ours}.attention_norm", f"{theirs}.input_layernorm", False),
            *query_key_value(
                f"{ours}.attention.query_key_value", attention, qkv_bias, num_heads=config.num_heads,
                grouped=config.kv_heads != config.num_heads,
            ),
            *linear(f"{ours}.attention.projection", f"{theirs}.self_attn.o_proj", config.linear_biases),
            *linear(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", False),
            *linear(f"{ours}.mlp.projection", f"{theirs}.mlp.down_proj", config.linear_biases),
        ]  # fmt: skip
        for part in ("gate", "up"):
            for kind in ("weight", "bias") if config.linear_biases else ("weight",):
                rules.append(Rule(f"{ours}.mlp.expansion.{kind}.{part}", (f"{theirs}.mlp.{part}_proj.{kind}",)))
        if config.query_key_norm:
            rules += linear(f"{ours}.attention.query_norm", f"{theirs}.self_attn.q_norm", False)
            rules += linear(f"{ours}.attention.key_norm", f"{theirs}.self_attn.k_norm", False)
    return rules + linear("final_norm", f"{prefix}norm", False) + _head(config)


def _read_bert(settings: Settings) -> dict[str, Any]:
    settings.require("is_decoder", False, [False])
    settings.require("position_embedding_type", "absolute", ["absolute"])
    dropout = settings.number("hidden_dropout_prob", 0.1)
    architecture = (settings.get("architectures") or ["BertForMaskedLM"])[0]
    return {
        "num_layers": settings.size("num_hidden_layers"),
        "hidden_size": settings.size("hidden_size"),
        "num_heads": settings.size("num_attention_heads"),
        "seq_len": settings.size("max_position_embeddings"),
        "ffn_hidden_size": settings.size("intermediate_size"),
        "vocab_size": settings.size("vocab_size"),
        "num_token_types": settings.size("type_vocab_size", 2),
        "tied_embeddings": settings.flag("tie_word_embeddings", True),
        "activation": settings.word("hidden_act", _GELUS, "gelu"),
        "layer_norm_eps": settings.number("layer_norm_eps", 1e-12),
        "init_std": settings.number("initializer_range", 0.02),
        "hidden_dropout": dropout,
        "embedding_dropout": dropout,
        "attention_dropout": settings.number("attention_probs_dropout_prob", 0.1),
        "post_norm": True,
        "masked_lm_head": architecture != "BertModel",
        "next_sentence_head": architecture == "BertForPreTraining",
    }


def _bert_rules(config: BERTConfig, prefix: str) -> list[Rule]:
    embeddings, head = f"{prefix}embeddings", "cls.predictions"
    rules = [
        Rule("token_embedding.weight", (f"{embeddings}.word_embeddings.weight",)),
        Rule("position_embedding", (f"{embeddings}.position_embeddings.weight",)),
        Rule("token_type_embedding", (f"{embeddings}.token_type_embeddings.weight",)),
        *linear("embedding_norm", f"{embeddings}.LayerNorm", True),
    ]
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"{prefix}encoder.layer.{i}"
        attention = [f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")]
        rules += [
            *query_key_value(
                f"{ours}.attention.query_key_value", attention, True, num_heads=config.num_heads, grouped=False
            ),
            *linear(f"{ours}.attention.projection", f"{theirs}.attention.output.dense", True),
            *linear(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm", True),
            *linear(f"{ours}.mlp.expansion", f"{theirs}.intermediate.dense", True),
            *linear(f"{ours}.mlp.projection", f"{theirs}.output.dense", True),
            *linear(f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm", True),
        ]
    if config.masked_lm_head:
        rules += [
            *linear("head_transform", f"{head}.transform.dense", True),
            *linear("head_norm", f"{head}.transform.LayerNorm", True),
            Rule("head_bias", (f"{head}.bias",)),
        ]
    if config.next_sentence_head:
        rules += linear("pooler", f"{prefix}pooler.dense", True)
        rules += linear("next_sentence", "cls.seq_relationship", True)
    return rules


# Where a model can be written as several, the first.
FAMILIES = (
    Family("gpt2", ("GPT2LMHeadModel", "GPT2Model"), "transformer.", _read_gpt2, _write_gpt2, _gpt2_rules),
    Family("llama", ("LlamaForCausalLM", "LlamaModel"), "model.", _read_llama, _write_llama, _llama_rules),
    Family("mistral", ("MistralForCausalLM", "MistralModel"), "model.", _read_mistral, _write_mistral, _llama_rules),
    Family("qwen2", ("Qwen2ForCausalLM", "Qwen2Model"), "model.", _read_qwen2, _write_qwen, _llama_rules),
    Family("qwen3", ("Qwen3ForCausalLM", "Qwen3Model"), "model.", _read_qwen3, _write_qwen, _llama_rules),
    Family(
        "bert", ("BertForMaskedLM", "BertForPreTraining", "BertModel"), "bert.", _read_bert, None, _bert_rules,
        BERTConfig,
    ),
)  # fmt: skip


def family_of(settings: Settings) -> Family:
    """The family that config.json names.

    Raises:
        InputError: one that is not known; the known ones are listed.
    """
    kind, architectures = settings.get("model_type"), settings.get("architectures")
    known = ", ".join(f"{family.architecture} ({family.model_type})" for family in FAMILIES)
    for family in FAMILIES:
        if kind == family.model_type and (not architectures or architectures[0] in family.architectures):
            return family
    raise InputError(
        f"{settings.source}: model_type={kind!r:.60} with architectures={architectures!r:.100} is not known "
        f"(known: {known})"
    )


def family_for(config: GPTConfig, preferred: str | None = None) -> Family:
    """A family that a model of ours can be written as.

    Args:
        config: of the model.
        preferred: model_type to try first.

    Raises:
        InputError: no family has a field of this model; the field is named.
    """
    differences: list[tuple[int, str]] = []
    writable = [family for family in FAMILIES if family.write is not None]
    for family in sorted(writable, key=lambda family: family.model_type != preferred):
        written = family.read_config(Settings(family.write_config(config), family.model_type))
        differing = differing_fields(written, config)
        if not differing:
            return family
        name = differing[0]
        value, theirs = getattr(config, name), getattr(written, name)
        differences.append((len(differing), f"{name}={value!r} ({family.model_type} has {theirs!r})"))
    raise InputError(f"no family of transformers' has this model: the nearest differs in {min(differences)[1]}")


def differing_fields(one: GPTConfig, other: GPTConfig) -> list[str]:
    """Names of the fields in which two models compute differently."""
    ours, theirs = _meaning(one), _meaning(other)
    return [name for name in ours if ours[name] != theirs[name]]


def _meaning(config: GPTConfig) -> Mapping[str, Any]:
    """Every field that matters, with its default filled in, and None where it has no effect."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    values |= {
        "num_kv_heads": config.kv_heads,
        "head_dim": config.head_size,
        "ffn_hidden_size": config.ffn_size,
        "qkv_bias": config.linear_biases if config.qkv_bias is None else config.qkv_bias,
        "rotary_fast_turns": config.fast_turns,
    }
    if config.position == "rotary":
        values["seq_len"] = None
    scaled = {"none": (), "linear": ("factor",), "dynamic": ("factor", "original")}.get(config.rotary_scaling)
    for name in values:
        scaling = name.startswith("rotary_") and name not in ("rotary_base", "rotary_fraction", "rotary_scaling")
        unused = scaling and scaled is not None and not any(word in name for word in scaled)
        if unused or (name.startswith("rotary_") and config.position != "rotary"):
            values[name] = None
    return values

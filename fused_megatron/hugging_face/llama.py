"""Hugging Face's Llama, Mistral, Qwen2 and Qwen3: their config.json and their common tensor names, translated."""

from collections.abc import Callable
from typing import Any

from fused_megatron.config import GPTConfig
from fused_megatron.hugging_face.family_description import Family
from fused_megatron.hugging_face.rope_settings import read_rotary, write_rotary
from fused_megatron.hugging_face.rules import Rule, linear, query_key_value, tied_or_own_head
from fused_megatron.hugging_face.settings import Settings

_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}


def read_llama_like(settings: Settings) -> dict[str, Any]:
    heads = settings.size("num_attention_heads")
    hidden = settings.size("hidden_size")
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
        "activation": settings.choice("hidden_act", _GATED, "silu"),
        "normalization": "rms_norm",
        "layer_norm_eps": settings.number("rms_norm_eps", 1e-6),
        "linear_biases": False,
        "init_std": settings.number("initializer_range", 0.02),
        "attention_dropout": settings.number("attention_dropout", 0.0),
        **read_rotary(settings),
    }


def read_llama(settings: Settings) -> dict[str, Any]:
    biases = settings.flag("attention_bias", False)
    settings.require("mlp_bias", False, [biases])
    return read_llama_like(settings) | {"linear_biases": biases}


def read_mistral(settings: Settings) -> dict[str, Any]:
    # Without the key, the default of Mistral's first release (4096); null means no window.
    window = settings.size("sliding_window", 4096 if "sliding_window" not in settings.values else None)
    return read_llama_like(settings) | {"sliding_window": window}


def read_qwen2(settings: Settings) -> dict[str, Any]:
    return read_llama_like(settings) | {"qkv_bias": True, "sliding_window": _qwen_window(settings)}


def read_qwen3(settings: Settings) -> dict[str, Any]:
    settings.require("attention_bias", False, [False])
    fields = read_llama_like(settings) | {"query_key_norm": True, "sliding_window": _qwen_window(settings)}
    return fields | {"head_dim": settings.size("head_dim", 128)}


def _qwen_window(settings: Settings) -> int | None:
    """Return the sliding window if all layers have it, None if no layer has one; raise if layers differ."""
    window = settings.size("sliding_window", 4096)
    if not settings.flag("use_sliding_window", False):
        return None
    layers = settings.size("num_hidden_layers")
    first = settings.get("max_window_layers", 28)
    kinds = settings.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    if len(set(kinds)) > 1:
        raise settings.unsupported("layer_types", kinds, ["one for all layers"])
    return int(window) if kinds[0] == "sliding_attention" else None


def write_llama_like(config: GPTConfig) -> dict[str, Any]:
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


def write_llama(config: GPTConfig) -> dict[str, Any]:
    return write_llama_like(config) | {"attention_bias": config.linear_biases, "mlp_bias": config.linear_biases}


def write_mistral(config: GPTConfig) -> dict[str, Any]:
    return write_llama_like(config) | {"sliding_window": config.sliding_window}


def write_qwen(config: GPTConfig) -> dict[str, Any]:
    window = config.sliding_window
    sliding = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    return write_llama_like(config) | sliding | {"attention_bias": False}


def mlp_rules(config: GPTConfig, ours: str, theirs: str) -> list[Rule]:
    """Return the rules of a gated MLP; `ours` and `theirs` are its names."""
    rules = linear(f"{ours}.projection", f"{theirs}.down_proj", config.linear_biases)
    for part in ("gate", "up"):
        for kind in ("weight", "bias") if config.linear_biases else ("weight",):
            rules.append(Rule(f"{ours}.expansion.{kind}.{part}", (f"{theirs}.{part}_proj.{kind}",)))
    return rules


def llama_rules(
    config: GPTConfig, prefix: str, feed_forward: Callable[[int, str, str], list[Rule]] | None = None
) -> list[Rule]:
    """Return the rules of a model.

    Args:
        config: of the model.
        prefix: of the tensor names in the folder.
        feed_forward: returns the rules of the feed-forward of a block, given its index and its names, ours and in the
            folder; None: an MLP.
    """
    qkv_bias = config.linear_biases if config.qkv_bias is None else config.qkv_bias
    rules = [Rule("token_embedding.weight", (f"{prefix}embed_tokens.weight",))]
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"{prefix}layers.{i}"
        attention = [f"{theirs}.self_attn.{kind}_proj" for kind in "qkv"]
        rules += [
            *linear(f"{ours}.attention_norm", f"{theirs}.input_layernorm", False),
            *query_key_value(
                f"{ours}.attention.query_key_value",
                attention,
                qkv_bias,
                num_heads=config.num_heads,
                grouped=config.kv_heads != config.num_heads,
            ),
            *linear(f"{ours}.attention.projection", f"{theirs}.self_attn.o_proj", config.linear_biases),
            *linear(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", False),
        ]
        if feed_forward is None:
            rules += mlp_rules(config, f"{ours}.mlp", f"{theirs}.mlp")
        else:
            rules += feed_forward(i, ours, theirs)
        if config.query_key_norm:
            rules += linear(f"{ours}.attention.query_norm", f"{theirs}.self_attn.q_norm", False)
            rules += linear(f"{ours}.attention.key_norm", f"{theirs}.self_attn.k_norm", False)
    return rules + linear("final_norm", f"{prefix}norm", False) + tied_or_own_head(config)


FAMILIES = (
    Family("llama", ("LlamaForCausalLM", "LlamaModel"), "model.", read_llama, write_llama, llama_rules),
    Family("mistral", ("MistralForCausalLM", "MistralModel"), "model.", read_mistral, write_mistral, llama_rules),
    Family("qwen2", ("Qwen2ForCausalLM", "Qwen2Model"), "model.", read_qwen2, write_qwen, llama_rules),
    Family("qwen3", ("Qwen3ForCausalLM", "Qwen3Model"), "model.", read_qwen3, write_qwen, llama_rules),
)

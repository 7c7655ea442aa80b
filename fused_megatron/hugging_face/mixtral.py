"""Hugging Face's Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE: Llama's layers with experts, translated to GPTConfig."""

from collections.abc import Callable
from typing import Any

from fused_megatron.config import GPTConfig
from fused_megatron.hugging_face.family_description import Family
from fused_megatron.hugging_face.llama import (
    llama_rules,
    mlp_rules,
    read_llama_like,
    write_llama_like,
)
from fused_megatron.hugging_face.rope_settings import read_rotary
from fused_megatron.hugging_face.rules import Rule
from fused_megatron.hugging_face.settings import Settings


def read_mixtral(settings: Settings) -> dict[str, Any]:
    settings.require("router_jitter_noise", 0.0, [0.0])
    fields = read_llama_like(settings) | read_rotary(settings, default_base=1e6)
    return (
        fields
        | _read_experts(settings, default_experts=8, default_selected=2)
        | {
            "sliding_window": settings.size("sliding_window", None),
            "layer_norm_eps": settings.number("rms_norm_eps", 1e-5),
        }
    )


def read_qwen2_moe(settings: Settings) -> dict[str, Any]:
    return (
        read_llama_like(settings)
        | _read_experts(settings, default_experts=60, default_selected=4)
        | _read_qwen_layers(settings)
        | {
            "qkv_bias": settings.flag("qkv_bias", True),
            "sliding_window": _read_window(settings),
            "num_shared_experts": 1,
            "shared_expert_ffn_size": settings.size("shared_expert_intermediate_size", 5632),
            "shared_expert_gate": True,
        }
    )


def read_qwen3_moe(settings: Settings) -> dict[str, Any]:
    settings.require("attention_bias", False, [False])
    sliding = settings.flag("use_sliding_window", False)
    return (
        read_llama_like(settings)
        | _read_experts(settings, default_experts=128, default_selected=8)
        | _read_qwen_layers(settings)
        | {"query_key_norm": True, "sliding_window": settings.size("sliding_window", 4096) if sliding else None}
    )


def read_olmoe(settings: Settings) -> dict[str, Any]:
    settings.require("clip_qkv", None, [None])
    settings.require("attention_bias", False, [False])
    return (
        read_llama_like(settings)
        | _read_experts(settings, default_experts=64, default_selected=8)
        | {
            "query_key_norm": True,
            "query_key_norm_over": "all_heads",
            "router_normalize": settings.flag("norm_topk_prob", False),
            "layer_norm_eps": settings.number("rms_norm_eps", 1e-5),
        }
    )


def _read_experts(settings: Settings, *, default_experts: int, default_selected: int) -> dict[str, Any]:
    # transformers 5 writes one of the two names for the models of the other, too.
    experts = settings.size("num_experts", settings.size("num_local_experts", default_experts))
    return {"num_experts": experts, "experts_per_token": settings.size("num_experts_per_tok", default_selected)}


def _read_qwen_layers(settings: Settings) -> dict[str, Any]:
    """Return the width of the experts, their normalisation, and which layers have experts."""
    every, layers = settings.size("decoder_sparse_step", 1), settings.size("num_hidden_layers")
    dense = settings.get("mlp_only_layers") or []
    sparse = [i not in dense and (i + 1) % every == 0 for i in range(layers)]
    first = next((n for n in range(layers) if sparse == [i >= n and (i + 1) % every == 0 for i in range(layers)]), None)
    if first is None:
        raise settings.unsupported("mlp_only_layers", dense, ["the first layers, and not all"])
    return {
        "expert_ffn_hidden_size": settings.size("moe_intermediate_size"),
        "router_normalize": settings.flag("norm_topk_prob", False),
        "moe_every": every,
        "num_dense_layers": first,
    }


def _read_window(settings: Settings) -> int | None:
    """Return the sliding window of Qwen2-MoE if all layers have it, None if none has; raise if layers differ."""
    if not settings.flag("use_sliding_window", False):
        return None
    most = settings.size("max_window_layers", 28)
    alternating = [
        "full_attention" if i % 2 or i >= most else "sliding_attention"
        for i in range(settings.size("num_hidden_layers"))
    ]
    kinds = settings.get("layer_types") or alternating
    if len(set(kinds)) > 1:
        raise settings.unsupported("layer_types", kinds, ["one for all layers"])
    return settings.size("sliding_window", 4096) if kinds[0] == "sliding_attention" else None


def write_mixtral(config: GPTConfig) -> dict[str, Any]:
    return write_llama_like(config) | {
        "intermediate_size": config.expert_ffn_size,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "sliding_window": config.sliding_window,
    }


def _write_qwen(config: GPTConfig) -> dict[str, Any]:
    return write_llama_like(config) | {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_ffn_size,
        "norm_topk_prob": config.router_normalize,
        "decoder_sparse_step": config.moe_every,
        "mlp_only_layers": list(range(config.num_dense_layers)),
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
    }


def write_qwen2_moe(config: GPTConfig) -> dict[str, Any]:
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return _write_qwen(config) | {
        # A model without shared experts differs then: the family always has them.
        "shared_expert_intermediate_size": max(1, config.shared_ffn_size),
        "qkv_bias": config.linear_biases if config.qkv_bias is None else config.qkv_bias,
        "layer_types": [kind] * config.num_layers,
    }


def write_qwen3_moe(config: GPTConfig) -> dict[str, Any]:
    return _write_qwen(config) | {"attention_bias": False}


def write_olmoe(config: GPTConfig) -> dict[str, Any]:
    return write_llama_like(config) | {
        "intermediate_size": config.expert_ffn_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.router_normalize,
        "attention_bias": False,
        "clip_qkv": None,
    }


def expert_rules(config: GPTConfig, ours: str, theirs: str, names: tuple[str, str, str]) -> list[Rule]:
    """Return the rules of the experts and of the router of a block.

    Args:
        config: of the model.
        ours: name of our feed-forward.
        theirs: name of the feed-forward in the folder.
        names: names of the gate, up and down projections of an expert in the folder.
    """
    gate, up, down = names
    rules = [Rule(f"{ours}.router.weight", (f"{theirs}.gate.weight",))]
    for expert in range(int(config.num_experts or 0)):
        source = f"{theirs}.experts.{expert}"
        rules += [
            Rule(f"{ours}.experts.expansion_weight.{expert}.gate", (f"{source}.{gate}.weight",)),
            Rule(f"{ours}.experts.expansion_weight.{expert}.up", (f"{source}.{up}.weight",)),
            Rule(f"{ours}.experts.projection_weight.{expert}", (f"{source}.{down}.weight",)),
        ]
    if config.num_shared_experts:
        rules += mlp_rules(config, f"{ours}.shared", f"{theirs}.shared_expert")
    if config.shared_expert_gate:
        rules.append(Rule(f"{ours}.shared_gate.weight", (f"{theirs}.shared_expert_gate.weight",)))
    return rules


def _rules(feed_forward: str, names: tuple[str, str, str]) -> Callable[[GPTConfig, str], list[Rule]]:
    """Return the function that makes the rules of a model whose experts have these names."""

    def rules(config: GPTConfig, prefix: str) -> list[Rule]:
        def block(index: int, ours: str, theirs: str) -> list[Rule]:
            if not config.has_experts(index):
                return mlp_rules(config, f"{ours}.mlp", f"{theirs}.mlp")
            return expert_rules(config, f"{ours}.mlp", f"{theirs}.{feed_forward}", names)

        return llama_rules(config, prefix, block)

    return rules


_MIXTRAL_RULES = _rules("block_sparse_moe", ("w1", "w3", "w2"))
_QWEN_RULES = _rules("mlp", ("gate_proj", "up_proj", "down_proj"))

FAMILIES = (
    Family("mixtral", ("MixtralForCausalLM", "MixtralModel"), "model.", read_mixtral, write_mixtral, _MIXTRAL_RULES),
    Family(
        "qwen3_moe", ("Qwen3MoeForCausalLM", "Qwen3MoeModel"), "model.", read_qwen3_moe, write_qwen3_moe, _QWEN_RULES
    ),
    Family(
        "qwen2_moe", ("Qwen2MoeForCausalLM", "Qwen2MoeModel"), "model.", read_qwen2_moe, write_qwen2_moe, _QWEN_RULES
    ),
    Family("olmoe", ("OlmoeForCausalLM", "OlmoeModel"), "model.", read_olmoe, write_olmoe, _QWEN_RULES),
)

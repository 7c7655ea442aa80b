"""Hugging Face's GPT-2: its config.json and tensor names, translated to GPTConfig and our names."""

from typing import Any

from fused_megatron.config import GPTConfig
from fused_megatron.hugging_face.family_description import Family
from fused_megatron.hugging_face.rules import Rule, linear, tied_or_own_head
from fused_megatron.hugging_face.settings import GELUS, Settings


def read_gpt2(settings: Settings) -> dict[str, Any]:
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
        "activation": settings.choice("activation_function", GELUS, "gelu_new"),
        "layer_norm_eps": settings.number("layer_norm_epsilon", 1e-5),
        "init_std": settings.number("initializer_range", 0.02),
        "hidden_dropout": settings.number("resid_pdrop", 0.1),
        "attention_dropout": settings.number("attn_pdrop", 0.1),
        "embedding_dropout": settings.number("embd_pdrop", 0.1),
    }


def write_gpt2(config: GPTConfig) -> dict[str, Any]:
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


def gpt2_rules(config: GPTConfig, prefix: str) -> list[Rule]:
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
        ]
    return rules + linear("final_norm", f"{prefix}ln_f", True) + tied_or_own_head(config)


FAMILIES = (Family("gpt2", ("GPT2LMHeadModel", "GPT2Model"), "transformer.", read_gpt2, write_gpt2, gpt2_rules),)

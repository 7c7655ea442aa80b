"""Hugging Face's BERT and MegatronBert: their config.json and tensor names, translated to BERTConfig and our names."""

from typing import Any

from fused_megatron.config import BERTConfig
from fused_megatron.hugging_face.family_description import Family
from fused_megatron.hugging_face.rules import Rule, linear, query_key_value
from fused_megatron.hugging_face.settings import GELUS, Settings


def read_bert(settings: Settings) -> dict[str, Any]:
    settings.require("is_decoder", False, [False])
    settings.require("position_embedding_type", "absolute", ["absolute"])
    dropout = settings.number("hidden_dropout_prob", 0.1)
    architecture = (settings.get("architectures") or ["BertForMaskedLM"])[0]
    bare = architecture.endswith("Model")
    return {
        "num_layers": settings.size("num_hidden_layers"),
        "hidden_size": settings.size("hidden_size"),
        "num_heads": settings.size("num_attention_heads"),
        "seq_len": settings.size("max_position_embeddings"),
        "ffn_hidden_size": settings.size("intermediate_size"),
        "vocab_size": settings.size("vocab_size"),
        "num_token_types": settings.size("type_vocab_size", 2),
        "tied_embeddings": settings.flag("tie_word_embeddings", True) or bare,
        "activation": settings.choice("hidden_act", GELUS, "gelu"),
        "layer_norm_eps": settings.number("layer_norm_eps", 1e-12),
        "init_std": settings.number("initializer_range", 0.02),
        "hidden_dropout": dropout,
        "embedding_dropout": dropout,
        "attention_dropout": settings.number("attention_probs_dropout_prob", 0.1),
        "post_norm": True,
        "masked_lm_head": not bare,
        "next_sentence_head": architecture.endswith("ForPreTraining"),
    }


def read_megatron_bert(settings: Settings) -> dict[str, Any]:
    return read_bert(settings) | {"post_norm": False}


def write_bert(config: BERTConfig) -> dict[str, Any]:
    head = "Model" if not config.masked_lm_head else "ForPreTraining" if config.next_sentence_head else "ForMaskedLM"
    return {
        "architectures": [f"{'Bert' if config.post_norm else 'MegatronBert'}{head}"],
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.seq_len,
        "intermediate_size": config.ffn_size,
        "type_vocab_size": max(1, config.num_token_types),
        "hidden_act": "gelu" if config.activation == "gelu_exact" else "gelu_new",
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
    }


def bert_rules(config: BERTConfig, prefix: str) -> list[Rule]:
    embeddings = f"{prefix}embeddings"
    head = "cls.predictions"
    rules = [
        Rule("token_embedding.weight", (f"{embeddings}.word_embeddings.weight",)),
        Rule("position_embedding", (f"{embeddings}.position_embeddings.weight",)),
        Rule("token_type_embedding", (f"{embeddings}.token_type_embeddings.weight",)),
    ]
    if config.post_norm:
        rules += linear("embedding_norm", f"{embeddings}.LayerNorm", True)
    else:
        rules += linear("final_norm", f"{prefix}encoder.ln", True)
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"{prefix}encoder.layer.{i}"
        attention = [f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")]
        rules += [
            *query_key_value(
                f"{ours}.attention.query_key_value", attention, True, num_heads=config.num_heads, grouped=False
            ),
            *linear(f"{ours}.attention.projection", f"{theirs}.attention.output.dense", True),
            *linear(f"{ours}.mlp.expansion", f"{theirs}.intermediate.dense", True),
            *linear(f"{ours}.mlp.projection", f"{theirs}.output.dense", True),
        ]
        norms = ("attention.output.LayerNorm", "output.LayerNorm") if config.post_norm else ("attention.ln", "ln")
        for norm, name in zip(("attention_norm", "mlp_norm"), norms, strict=True):
            rules += linear(f"{ours}.{norm}", f"{theirs}.{name}", True)
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


_UNTRAINED = ("pooler.*", "bert.pooler.*", "cls.seq_relationship.*")

FAMILIES = (
    Family(
        "bert",
        ("BertForMaskedLM", "BertForPreTraining", "BertModel"),
        "bert.",
        read_bert,
        write_bert,
        bert_rules,
        BERTConfig,
        _UNTRAINED,
    ),
    Family(
        "megatron-bert",
        ("MegatronBertForMaskedLM", "MegatronBertForPreTraining", "MegatronBertModel"),
        "bert.",
        read_megatron_bert,
        write_bert,
        bert_rules,
        BERTConfig,
        _UNTRAINED,
    ),
)

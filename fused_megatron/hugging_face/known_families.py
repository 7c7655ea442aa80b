"""The supported Hugging Face model families, and the search for the family of a config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fused_megatron.checks import InputError
from fused_megatron.config import TransformerConfig
from fused_megatron.hugging_face import bert, gpt2, llama, mixtral
from fused_megatron.hugging_face.family_description import Family
from fused_megatron.hugging_face.settings import Settings

# In order of preference: a model that several families can hold is exported as the first of them.
FAMILIES = (*gpt2.FAMILIES, *llama.FAMILIES, *mixtral.FAMILIES, *bert.FAMILIES)

# Fields that affect training only, not what the model computes.
_TRAINING_FIELDS = {
    "init_std",
    "hidden_dropout",
    "attention_dropout",
    "embedding_dropout",
    "recompute",
    "pad_vocab_size_to_multiple_of",
    "balance_loss",
    "balance_loss_over",
    "router_z_loss",
    "router_jitter",
}
# More fields than a config has: a family that cannot hold the model at all differs most.
_ALL_FIELDS = 1000
# Fields that affect results only in a model with experts.
_EXPERT_FIELDS = (
    "experts_per_token",
    "router_scores",
    "router_normalize",
    "router_scale",
)


def family_of(settings: Settings) -> Family:
    """Return the family that config.json names.

    Raises:
        InputError: the family is not known; lists the known ones.
    """
    kind = settings.get("model_type")
    architectures = settings.get("architectures")
    known = ", ".join(f"{family.architecture} ({family.model_type})" for family in FAMILIES)
    for family in FAMILIES:
        if kind == family.model_type and (not architectures or architectures[0] in family.architectures):
            return family
    raise InputError(
        f"{settings.source}: model_type={kind!r:.60} with architectures={architectures!r:.100} is not known "
        f"(known: {known})"
    )


def family_for(config: TransformerConfig, preferred: str | None = None) -> Family:
    """Return a family whose config.json can describe a model of ours.

    Args:
        config: config of the model.
        preferred: model_type to try first.

    Raises:
        InputError: every family lacks some field of this model; names one field of the nearest family.
    """
    differences: list[tuple[int, str]] = []
    writable = [family for family in FAMILIES if family.config_type is type(config)]
    for family in sorted(writable, key=lambda family: family.model_type != preferred):
        try:
            written = family.read_config(Settings(family.write_config(config), family.model_type))
        except InputError as error:  # sizes that the family cannot have, such as heads that do not divide hidden_size
            differences.append((_ALL_FIELDS, str(error)))
            continue
        differing = differing_fields(written, config)
        if not differing:
            return family
        name = differing[0]
        value, theirs = getattr(config, name), getattr(written, name)
        differences.append((len(differing), f"{name}={value!r} ({family.model_type} has {theirs!r})"))
    count, nearest = min(differences)
    raise InputError(
        f"no family of transformers' has this model: "
        f"{nearest if count == _ALL_FIELDS else f'the nearest differs in {nearest}'}"
    )


def differing_fields(one: TransformerConfig, other: TransformerConfig) -> list[str]:
    """Return the names of the fields by which two models compute different results."""
    ours, theirs = _meaning(one), _meaning(other)
    return [name for name in ours if ours[name] != theirs[name]]


def _meaning(config: TransformerConfig) -> Mapping[str, Any]:
    """Return the fields that affect results, with defaults filled in; a field without effect is None."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _TRAINING_FIELDS}
    values |= {
        "num_kv_heads": config.kv_heads,
        "head_dim": config.head_size,
        "ffn_hidden_size": config.ffn_size,
        "qkv_bias": config.linear_biases if config.qkv_bias is None else config.qkv_bias,
        "rotary_fast_turns": config.fast_turns,
    }
    values |= _experts_meaning(config)
    if config.position == "rotary":
        values["seq_len"] = None
    scaled = {"none": (), "linear": ("factor",), "dynamic": ("factor", "original")}.get(config.rotary_scaling)
    for name in values:
        scaling = name.startswith("rotary_") and name not in ("rotary_base", "rotary_fraction", "rotary_scaling")
        unused = scaling and scaled is not None and not any(part in name for part in scaled)
        if unused or (name.startswith("rotary_") and config.position != "rotary"):
            values[name] = None
    return values


def _experts_meaning(config: TransformerConfig) -> dict[str, Any]:
    """Return the fields of experts as _meaning does."""
    blocks = config.expert_blocks
    meaning: dict[str, Any] = {
        "moe_every": blocks,
        "num_dense_layers": None,
        "num_shared_experts": None,
        "expert_ffn_hidden_size": config.expert_ffn_size if blocks else None,
        "shared_expert_ffn_size": config.shared_ffn_size,
    }
    if len(blocks) == config.num_layers:
        meaning["ffn_hidden_size"] = None
    if not config.query_key_norm:
        meaning["query_key_norm_over"] = None
    return meaning if blocks else meaning | dict.fromkeys(_EXPERT_FIELDS)

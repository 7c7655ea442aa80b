"""Rotary settings of config.json (rope_scaling of transformers 4, rope_parameters of 5), to and from GPTConfig."""

import math
from typing import Any

from fused_megatron.checks import check
from fused_megatron.config import GPTConfig
from fused_megatron.hugging_face.settings import Settings

# rope_type of config.json to our rotary_scaling, and back.
_SCALINGS = {"default": "none", "linear": "linear", "dynamic": "dynamic", "llama3": "llama3", "yarn": "yarn"}
_ROPE_TYPES = {ours: theirs for theirs, ours in _SCALINGS.items()}


def read_rotary(settings: Settings, *, default_base: float = 10000.0) -> dict[str, Any]:
    """Read the rotary fields of a GPTConfig, and seq_len, which dynamic scaling extends."""
    table = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    check(isinstance(table, dict), f"{settings.source}: rope_scaling={table!r:.60} must be an object or null")
    rope = Settings({"rope_type": table.get("type"), **table}, f"{settings.source}: rope_scaling")
    context = settings.size("max_position_embeddings")
    scaling = rope.choice("rope_type", _SCALINGS, "default")
    fields: dict[str, Any] = {
        "position": "rotary",
        "seq_len": context,
        "rotary_base": rope.number("rope_theta", settings.number("rope_theta", default_base)),
        "rotary_fraction": rope.number("partial_rotary_factor", settings.number("partial_rotary_factor", 1.0)),
        "rotary_scaling": scaling,
    }
    if scaling == "none":
        return fields
    original = settings.size("original_max_position_embeddings", rope.size("original_max_position_embeddings", context))
    factor = rope.number("factor", context / original if scaling == "yarn" else 1.0)
    fields["rotary_scaling_factor"] = factor
    if scaling == "dynamic":
        return fields | {"rotary_original_seq_len": context, "seq_len": round(context * factor)}
    if scaling == "linear":
        return fields
    fields["rotary_original_seq_len"] = original
    if scaling == "llama3":
        turns = {
            "rotary_slow_turns": rope.number("low_freq_factor"),
            "rotary_fast_turns": rope.number("high_freq_factor"),
        }
        return fields | turns
    rope.require("truncate", True, [True])
    turns = {"rotary_slow_turns": rope.number("beta_slow", 1.0), "rotary_fast_turns": rope.number("beta_fast", 32.0)}
    return fields | turns | {"rotary_attention_factor": _yarn_attention_factor(rope, factor)}


def _yarn_attention_factor(rope: Settings, factor: float) -> float | None:
    """Return the factor of the attention scores; None: YaRN's default, which depends only on the scaling factor."""
    stated, mscale, mscale_all = (rope.number(name, None) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if stated is not None or not (mscale and mscale_all):
        return stated
    numerator, denominator = (0.1 * m * math.log(factor) + 1.0 for m in (mscale, mscale_all))
    return numerator / denominator


def write_rotary(config: GPTConfig) -> dict[str, Any]:
    """Write the fields that read_rotary reads, in the form of transformers 4, which version 5 also reads."""
    scaling = config.rotary_scaling
    written: dict[str, Any] = {"max_position_embeddings": config.seq_len, "rope_theta": config.rotary_base}
    if config.rotary_fraction != 1.0:
        written["partial_rotary_factor"] = config.rotary_fraction
    if scaling == "none":
        return written | {"rope_scaling": None}
    table: dict[str, Any] = {"rope_type": _ROPE_TYPES[scaling], "factor": config.rotary_scaling_factor}
    if scaling == "dynamic":
        written["max_position_embeddings"] = config.rotary_original_seq_len
    if scaling in ("llama3", "yarn"):
        low, high = ("low_freq_factor", "high_freq_factor") if scaling == "llama3" else ("beta_slow", "beta_fast")
        table |= {
            "original_max_position_embeddings": config.rotary_original_seq_len,
            low: config.rotary_slow_turns,
            high: config.fast_turns,
        }
    if config.rotary_attention_factor is not None:
        table["attention_factor"] = config.rotary_attention_factor
    return written | {"rope_scaling": table}

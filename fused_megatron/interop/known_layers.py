"""Tensor-parallel plans for models without a tp_plan, found by the names, classes and sizes of their layers."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

# Attributes of attention modules that hold the width of a head. A shard holds whole heads.
HEAD_DIMS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
NUM_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads")
# Attributes of attention modules that are divided by the number of ranks.
_DIVIDED = (*NUM_HEADS, "num_key_value_heads", "inner_dim", "all_head_size")


@dataclass(frozen=True)
class KnownUnit:
    """Layers of a model family that must be sharded together, found by their names and attributes.

    Attributes:
        styles: style of each layer, by the end of the layer's name; all layers must exist.
        owner: end of the name of the module that has the attributes `divided`.
        divided: attributes by which the owner's forward counts heads or features; all must exist. They are divided by
            the number of ranks.
        kinds: exact classes that the owner may have; empty allows any class.
    """

    styles: Mapping[str, str]
    owner: str = ""
    divided: tuple[str, ...] = ()
    kinds: tuple[type[nn.Module], ...] = ()


KNOWN_UNITS = (
    # GPT-2
    KnownUnit({"attn.c_attn": "packed_colwise_3", "attn.c_proj": "rowwise"}, "attn", ("num_heads", "split_size")),
    KnownUnit({"mlp.c_fc": "colwise", "mlp.c_proj": "rowwise"}),
    # BERT, RoBERTa, ELECTRA and similar models
    KnownUnit(
        {
            "attention.self.query": "colwise",
            "attention.self.key": "colwise",
            "attention.self.value": "colwise",
            "attention.output.dense": "rowwise",
        },
        "attention.self",
        ("num_attention_heads", "all_head_size"),
    ),
    KnownUnit({"intermediate.dense": "colwise", "output.dense": "rowwise"}),
    # torch's own layers; their attention is a single module that cannot be sharded from outside.
    KnownUnit(
        {"linear1": "colwise", "linear2": "rowwise"},
        kinds=(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
    ),
    # Llama-like models without a tp_plan: only the MLP, since attention is written in too many ways.
    KnownUnit({"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}),
)
# Replicated on purpose in these families: small, or not followed by a layer that could take shards.
KNOWN_WHOLE = (
    "wpe", "position_embeddings", "token_type_embeddings", "pooler.dense", "predictions.transform.dense",
    "seq_relationship", "score", "classifier", "qa_outputs",
)  # fmt: skip


# By the names of their linears, attention classes that were tried and whose heads are independent. Other classes with
# the same names mix heads (Autoformer's): their shards would compute wrong numbers without any error.
KNOWN_ATTENTION = {
    ("q_proj", "k_proj", "v_proj", "out_proj"): (
        "OPTAttention", "BartAttention", "MBartAttention", "MarianAttention", "PegasusAttention", "XGLMAttention",
        "WhisperAttention", "CLIPAttention", "SiglipAttention", "GPTJAttention", "GPTNeoSelfAttention",
    ),
    ("q_proj", "k_proj", "v_proj", "o_proj"): (
        "ViTAttention", "DeiTAttention", "Dinov2Attention", "StableLmAttention", "HunYuanDenseV1Attention",
    ),
    ("q_lin", "k_lin", "v_lin", "out_lin"): ("DistilBertSelfAttention",),
    ("q", "k", "v", "o"): ("T5Attention", "MT5Attention", "UMT5Attention"),
}  # fmt: skip
# Linears of MLPs that have only an activation (and a product) between them. Used in models with known attention only.
KNOWN_MLPS = (
    ("fc1", "fc2"), ("fc_in", "fc_out"), ("lin1", "lin2"), ("wi", "wo"), ("wi_0", "wi_1", "wo"),
    ("gate_proj", "up_proj", "down_proj"),
)  # fmt: skip


@dataclass
class KnownLayers:
    """The layers of one model that were recognised.

    Attributes:
        styles: style by module name.
        patterns: by module name, the pattern that gave the style.
        divided: (module name, attribute) of numbers to divide by the number of ranks.
    """

    styles: dict[str, str] = field(default_factory=dict)
    patterns: dict[str, str] = field(default_factory=dict)
    divided: tuple[tuple[str, str], ...] = ()


def matches(pattern: str, name: str) -> bool:
    """Whether a dotted name ends with the pattern; * stands for any one part."""
    wanted, parts = pattern.split("."), name.split(".")
    return len(wanted) <= len(parts) and all(map(fnmatch.fnmatchcase, parts[-len(wanted) :], wanted))


def known_layers(model: nn.Module, names: list[str]) -> KnownLayers:
    """Recognise the layers of a model; `names` are the names of its modules."""
    known = KnownLayers()
    for unit in KNOWN_UNITS:
        _add_unit(known, unit, model, names)
    attention = {name: found for name, module in model.named_modules() if (found := _heads_of(module)) is not None}
    for name, (styles, divided) in attention.items():
        known.styles |= {f"{name}.{end}": style for end, style in styles.items()}
        known.patterns |= {f"{name}.{end}": end for end in styles}
        known.divided += tuple((name, attribute) for attribute in divided)
    if attention:
        _add_mlps(known, model)
    if known.styles:
        for name in names:
            if name not in known.styles and any(matches(end, name) for end in KNOWN_WHOLE):
                known.styles[name], known.patterns[name] = "replicate", name.split(".")[-1]
    return known


def _add_unit(known: KnownLayers, unit: KnownUnit, model: nn.Module, names: list[str]) -> None:
    present = set(names)
    lead = next(iter(unit.styles))
    for name in names:
        prefix = name[: len(name) - len(lead)]
        if not matches(lead, name) or not all(prefix + end in present for end in unit.styles):
            continue
        owner_name = (prefix + unit.owner).rstrip(".")
        owner = model.get_submodule(owner_name)
        if unit.kinds and type(owner) not in unit.kinds:
            continue
        numbers = [getattr(owner, attribute, None) for attribute in unit.divided]
        if all(isinstance(number, int) for number in numbers):
            known.styles |= {prefix + end: style for end, style in unit.styles.items()}
            known.patterns |= {prefix + end: end for end in unit.styles}
            known.divided += tuple((owner_name, attribute) for attribute in unit.divided)


def _matrices(module: Any, names: tuple[str, ...]) -> list[torch.Tensor] | None:
    """Return the weights of a module's linears; None if one of them has no matrix."""
    found = (getattr(module._modules[name], "weight", None) for name in names)
    weights = [weight for weight in found if isinstance(weight, torch.Tensor) and weight.dim() == 2]
    return weights if len(weights) == len(names) else None


def _heads_of(module: Any) -> tuple[dict[str, str], list[str]] | None:
    """Return the styles of an attention module's layers by name, and its attributes to divide; None if not known."""
    names = next((n for n, kinds in KNOWN_ATTENTION.items() if type(module).__name__ in kinds), None)
    head_dim = next((v for n in HEAD_DIMS if isinstance(v := getattr(module, n, None), int)), None)
    if names is None or head_dim is None or not set(names) <= set(module._modules) or module._parameters:
        return None
    linears = _matrices(module, names)
    if linears is None:
        return None
    query, key, value, output = linears
    heads, rest = query.shape[0] // head_dim, query.shape[0] % head_dim
    if rest or query.shape[0] != output.shape[1] or key.shape != value.shape or query.shape[0] % key.shape[0]:
        return None
    styles = dict(zip(names, ("colwise", "colwise", "colwise", "rowwise"), strict=True))
    for name, child in module.named_children():
        if name in names or next(child.parameters(), None) is None:
            continue
        weight = child._parameters.get("weight")
        if isinstance(child, nn.Embedding) and child.embedding_dim == heads:
            styles[name] = "embedding_colwise"
        elif weight is not None and tuple(weight.shape) == (head_dim,):
            styles[name] = "replicated_with_grad_allreduce"
        else:
            return None
    counts = (heads, key.shape[0] // head_dim, query.shape[0])
    return styles, [name for name in _DIVIDED if getattr(module, name, None) in counts]


def _add_mlps(known: KnownLayers, model: nn.Module) -> None:
    for name, module in model.named_modules():
        for ends in KNOWN_MLPS:
            if not set(ends) <= set(module._modules):
                continue
            paths = [f"{name}.{end}".strip(".") for end in ends]
            weights = _matrices(module, ends)
            if weights is None or any(path in known.styles for path in paths):
                continue
            # With other widths, something between the linears cuts or joins features.
            if all(weight.shape[0] == weights[-1].shape[1] for weight in weights[:-1]):
                known.styles |= dict.fromkeys(paths[:-1], "colwise") | {paths[-1]: "rowwise"}
                known.patterns |= dict(zip(paths, ends, strict=True))

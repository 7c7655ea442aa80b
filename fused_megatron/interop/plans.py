"""Which layer is sharded how: a user's plan, the model's own metadata, or what is known of families without any."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fused_megatron.checks import InputError

# Styles by their meaning here. The first eight are those of transformers' plans, which also has the aliases.
STYLES = {
    "colwise": "output features in shards, which a following rowwise layer takes",
    "rowwise": "input features in shards, as a colwise layer before leaves them; the result is whole",
    "colwise_gather_output": "output features in shards, gathered: for heads, or where all features are needed",
    "rowwise_split_input": "input features in shards, cut from a whole input",
    "packed_colwise": "colwise of a layer that stacks 2 equal parts (gate and up)",
    "embedding_rowwise": "an embedding in shards of its vocabulary",
    "replicated_with_grad_allreduce": "a norm between colwise and rowwise, whole; its gradient is summed over ranks",
    "replicate": "whole on every rank, on purpose",
    "packed_colwise_3": "colwise of a layer that stacks 3 equal parts (query, key and value)",
}
ALIASES = {
    "colwise_rep": "colwise_gather_output",
    "rowwise_rep": "rowwise_split_input",
    "replicated": "replicate",
    "vocab_parallel": "embedding_rowwise",
}
PARTS = {"packed_colwise": 2, "packed_colwise_3": 3}
COLUMN_STYLES = ("colwise", "packed_colwise", "packed_colwise_3")


@dataclass(frozen=True)
class KnownUnit:
    """Layers that belong together in a family whose models say nothing themselves, by their names and attributes.

    Attributes:
        styles: by the end of the layers' names; all must be there.
        owner: which module, by the end of its name, has the numbers in `divided`; they are what its forward counts
            heads and features by, and become those of one rank.
        divided: attributes of owner; all must be there.
        kinds: classes that owner must be of, exactly; any where there are none.
    """

    styles: Mapping[str, str]
    owner: str = ""
    divided: tuple[str, ...] = ()
    kinds: tuple[type[nn.Module], ...] = ()


KNOWN_UNITS = (
    # GPT-2
    KnownUnit({"attn.c_attn": "packed_colwise_3", "attn.c_proj": "rowwise"}, "attn", ("num_heads", "split_size")),
    KnownUnit({"mlp.c_fc": "colwise", "mlp.c_proj": "rowwise"}),
    # BERT, RoBERTa, ELECTRA and their kin
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
    # torch's own layers; their attention is one module that cannot be sharded from outside.
    KnownUnit(
        {"linear1": "colwise", "linear2": "rowwise"},
        kinds=(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
    ),
    # The Llama shape without metadata: the MLP alone, since attention is written in too many ways.
    KnownUnit({"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}),
)
# In these families, whole on purpose: small, or not followed by a layer that could take shards.
KNOWN_WHOLE = (
    "wpe", "position_embeddings", "token_type_embeddings", "pooler.dense", "predictions.transform.dense",
    "seq_relationship", "score", "classifier", "qa_outputs",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a plan asks for.

    Attributes:
        origin: whose plan it is, for reports and errors.
        styles: by the name of the module.
        patterns: by the name of the module, the pattern that named it.
        unused: patterns that match nothing.
        divided: by module, attributes that become those of one rank.
        explicit: the user's own: what it asks for is done or refused, never left out.
    """

    origin: str
    styles: dict[str, str]
    patterns: dict[str, str]
    unused: tuple[str, ...] = ()
    divided: tuple[tuple[str, str], ...] = ()
    explicit: bool = False


def matches(pattern: str, name: str) -> bool:
    """Whether the last parts of a dotted name are those of the pattern; * stands for any one part."""
    wanted, parts = pattern.split("."), name.split(".")
    return len(wanted) <= len(parts) and all(map(fnmatch.fnmatchcase, parts[-len(wanted) :], wanted))


def matching(pattern: str, names: list[str]) -> list[str]:
    """The names that are a pattern as a whole; where there are none, those that end with it."""
    found = [name for name in names if matches(pattern, name)]
    whole = [name for name in found if name.count(".") == pattern.count(".")]
    return whole or found


def find_plan(model: nn.Module, plan: Mapping[str, str] | None) -> Plan:
    """The plan that counts: the user's; else the model's own; else what is known of its layers.

    Raises:
        InputError: a user's plan with a style that there is none of, or a pattern that matches nothing.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if plan is not None:
        found = _apply("plan", {k: ALIASES.get(v, v) for k, v in plan.items()}, names, explicit=True)
        _check_explicit(found, names)
        return found
    own = getattr(model, "_tp_plan", None) or getattr(getattr(model, "config", None), "base_model_tp_plan", None)
    if isinstance(own, Mapping) and own:
        styles = {str(k): ALIASES.get(v, v) if isinstance(v, str) else str(v) for k, v in own.items()}
        return _with_ends(model, _apply(f"{type(model).__name__}'s tp_plan", styles, names))
    return _with_ends(model, _known(model, names))


def _apply(origin: str, plan: Mapping[str, str], names: list[str], explicit: bool = False) -> Plan:
    styles: dict[str, str] = {}
    patterns: dict[str, str] = {}
    used = set()
    # The longest pattern that fits a name counts.
    for pattern in sorted(plan, key=lambda p: -len(p.split("."))):
        for name in matching(pattern, names):
            used.add(pattern)
            if name not in styles:
                styles[name], patterns[name] = plan[pattern], pattern
    return Plan(origin, styles, patterns, tuple(p for p in plan if p not in used), explicit=explicit)


def _check_explicit(plan: Plan, names: list[str]) -> None:
    for name, style in plan.styles.items():
        if style not in STYLES:
            raise InputError(f"plan[{plan.patterns[name]!r}]={style!r} must be one of: {', '.join(map(repr, STYLES))}")
    if plan.unused:
        pattern = plan.unused[0]
        near = _nearest(pattern, names)
        raise InputError(f"plan[{pattern!r}] matches no module of the model{near}")


def _nearest(pattern: str, names: list[str]) -> str:
    last = pattern.split(".")[-1]
    near = [name for name in names if name.split(".")[-1] == last]
    ends = sorted({".".join("*" if p.isdigit() else p for p in name.split(".")) for name in near or names})
    return f" (its modules are: {', '.join(ends[:8])}{', ..' if len(ends) > 8 else ''})"


def _known(model: nn.Module, names: list[str]) -> Plan:
    styles: dict[str, str] = {}
    patterns: dict[str, str] = {}
    divided: list[tuple[str, str]] = []
    present = set(names)
    for unit in KNOWN_UNITS:
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
                styles |= {prefix + end: style for end, style in unit.styles.items()}
                patterns |= {prefix + end: end for end in unit.styles}
                divided += [(owner_name, attribute) for attribute in unit.divided]
    if styles:
        for name in names:
            if name not in styles and any(matches(end, name) for end in KNOWN_WHOLE):
                styles[name], patterns[name] = "replicate", name.split(".")[-1]
    return Plan("the table of known layers", styles, patterns, divided=tuple(divided))


def _with_ends(model: nn.Module, plan: Plan) -> Plan:
    """The plan with the model's embedding and head, of which metadata and tables say little or nothing."""
    if not plan.styles:
        return plan
    ends = (("get_input_embeddings", "embedding_rowwise"), ("get_output_embeddings", "colwise_gather_output"))
    for getter, style in ends:
        try:
            module = getattr(model, getter)()
        except Exception:  # no such method, or none of that kind: a model without one
            continue
        for name, candidate in model.named_modules(remove_duplicate=False):
            if candidate is module and name and name not in plan.styles:
                plan.styles[name], plan.patterns[name] = style, f"{getter}()"
    return plan

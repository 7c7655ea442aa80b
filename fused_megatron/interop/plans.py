"""Sharding plans: the style of every layer, from the user, from the model's tp_plan, or from the known layers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.interop.adapters import innermost, model_names
from fused_megatron.interop.known_experts import ROUTERS, SHARED_EXPERTS, SHARED_STYLES, holds_experts, is_adapted
from fused_megatron.interop.known_layers import KnownLayers, known_layers, matches

# Every style and its meaning. The first eight are styles of transformers' plans, and so are the aliases.
STYLES = {
    "colwise": "output features sharded, for a following rowwise layer",
    "rowwise": "input features sharded, after a colwise layer; the output is summed over ranks",
    "colwise_gather_output": "output features sharded and gathered: for heads, or if all features are needed",
    "rowwise_split_input": "input features sharded; the layer splits its full input",
    "packed_colwise": "colwise of a layer that stacks 2 equal parts (gate and up)",
    "embedding_rowwise": "an embedding sharded over its vocabulary",
    "replicated_with_grad_allreduce": "a norm between colwise and rowwise: replicated, its gradient summed over ranks",
    "replicate": "replicated on purpose",
    "packed_colwise_3": "colwise of a layer that stacks 3 equal parts (query, key and value)",
    "interleaved_colwise": "colwise of a layer whose parts alternate head by head (query, key and value of GPT-NeoX)",
    "embedding_colwise": "an embedding with a feature for every head (a bias of relative positions)",
    "experts": "the experts of a layer: over the ranks of ep, or each expert's features over the ranks of tp",
}
ALIASES = {
    "colwise_rep": "colwise_gather_output",
    "rowwise_rep": "rowwise_split_input",
    "replicated": "replicate",
    "vocab_parallel": "embedding_rowwise",
    "moe_tp_experts": "experts",
}
# In a user's plan: the style that the model's own plan gives.
DEFAULT = "default"
PARTS = {"packed_colwise": 2, "packed_colwise_3": 3}
COLUMN_STYLES = ("colwise", "packed_colwise", "packed_colwise_3", "interleaved_colwise")


@dataclass(frozen=True)
class Plan:
    """The plan of one model.

    Attributes:
        origin: where the plan comes from, for reports and errors.
        styles: style by module name.
        patterns: by module name, the pattern that matched it.
        unused: patterns that match no module.
        divided: (module name, attribute) of numbers to divide by the number of ranks.
        asked: names of the modules whose style the user wrote: if one cannot be sharded, parallelize raises.
    """

    origin: str
    styles: dict[str, str]
    patterns: dict[str, str]
    unused: tuple[str, ...] = ()
    divided: tuple[tuple[str, str], ...] = ()
    asked: frozenset[str] = frozenset()


def matching(pattern: str, names: list[str]) -> list[str]:
    """Return the names that equal a pattern; if there are none, the names that end with it."""
    found = [name for name in names if matches(pattern, name)]
    equal = [name for name in found if name.count(".") == pattern.count(".")]
    return equal or found


def find_plan(model: nn.Module, plan: Mapping[str, str] | None) -> Plan:
    """Return the plan to use: the user's; else the model's own tp_plan; else the table of known layers.

    A user's plan with the style "default" extends the plan that the model has without it.

    Raises:
        InputError: the user's plan has an unknown style, a pattern that matches nothing, or "default" for a model
            without a plan of its own.
    """
    names = model_names(model)
    if plan is None:
        return _own_plan(model, names)
    found = _apply("plan", {k: ALIASES.get(v, v) for k, v in plan.items()}, names)
    found = replace(found, asked=frozenset(found.styles))
    _check_asked(found, names)
    return _extended(found, _own_plan(model, names)) if DEFAULT in found.styles.values() else found


def _extended(asked: Plan, own: Plan) -> Plan:
    """Return the user's plan with the model's own style where the user wrote "default"."""
    if not own.styles:
        raise InputError(
            f"plan with {DEFAULT!r}: the model has no plan of its own (neither a tp_plan nor known layers: name its "
            "layers and their styles)"
        )
    taken = {name for name, style in asked.styles.items() if style == DEFAULT}
    kept = {name: style for name, style in asked.styles.items() if name not in taken}
    styles = {name: style for name, style in own.styles.items() if name in taken} | kept
    return Plan(
        f"plan and {own.origin}",
        styles,
        {name: (own if name in taken else asked).patterns[name] for name in styles},
        own.unused,
        own.divided,
        frozenset(kept),
    )


def _own_plan(model: nn.Module, names: list[str]) -> Plan:
    """Return the plan of a model whose user gives none."""
    own = getattr(model, "_tp_plan", None) or getattr(getattr(model, "config", None), "base_model_tp_plan", None)
    if isinstance(own, Mapping) and own:
        styles = {str(k): ALIASES.get(v, v) if isinstance(v, str) else str(v) for k, v in own.items()}
        planned = _completed(_apply(f"{type(model).__name__}'s tp_plan", styles, names), known_layers(model, names))
        return _with_ends(model, _with_experts(model, planned))
    known = known_layers(model, names)
    planned = Plan("the table of known layers", known.styles, known.patterns, divided=known.divided)
    return _with_ends(model, _with_experts(model, planned))


def _apply(origin: str, plan: Mapping[str, str], names: list[str]) -> Plan:
    styles: dict[str, str] = {}
    patterns: dict[str, str] = {}
    used = set()
    # The longest matching pattern wins; of two with the same length, the pattern with fewer wildcards.
    for pattern in sorted(plan, key=lambda p: (-len(p.split(".")), p.count("*"))):
        ends = plan[pattern] == DEFAULT  # "*" means every layer then, and not only those at the top
        for name in [name for name in names if matches(pattern, name)] if ends else matching(pattern, names):
            used.add(pattern)
            if name not in styles:
                styles[name], patterns[name] = plan[pattern], pattern
    return Plan(origin, styles, patterns, tuple(p for p in plan if p not in used))


def _check_asked(plan: Plan, names: list[str]) -> None:
    allowed = (*STYLES, DEFAULT)
    for name, style in plan.styles.items():
        if style not in allowed:
            raise InputError(f"plan[{plan.patterns[name]!r}]={style!r} must be one of: {', '.join(map(repr, allowed))}")
    if plan.unused:
        pattern = plan.unused[0]
        near = _nearest(pattern, names)
        raise InputError(f"plan[{pattern!r}] matches no module of the model{near}")


def _nearest(pattern: str, names: list[str]) -> str:
    last = pattern.split(".")[-1]
    near = [name for name in names if name.split(".")[-1] == last]
    ends = sorted({".".join("*" if p.isdigit() else p for p in name.split(".")) for name in near or names})
    return f" (its modules are: {', '.join(ends[:8])}{', ..' if len(ends) > 8 else ''})"


def _completed(plan: Plan, known: KnownLayers) -> Plan:
    """Add the known layers to a tp_plan that names no layer of a stack, only the head for example."""
    if any(part.isdigit() for name in plan.styles for part in name.split(".")):
        return plan
    planned = {name.rpartition(".")[0] for name in plan.styles}
    added = {name: style for name, style in known.styles.items() if name.rpartition(".")[0] not in planned}
    if not added:
        return plan
    return replace(
        plan,
        origin=f"{plan.origin} and the table of known layers",
        styles={**added, **plan.styles},
        patterns={**{name: known.patterns[name] for name in added}, **plan.patterns},
        divided=known.divided,
    )


def _with_experts(model: nn.Module, plan: Plan) -> Plan:
    """Add the experts of a model, the dense experts beside them, and the routers, which stay whole."""
    modules = dict(model.named_modules())
    weights = set()
    for name, module in modules.items():
        if not (holds_experts(module) or is_adapted(module)):
            continue
        weights |= {f"{name}.{weight}" for weight in module._parameters}
        around = name.rpartition(".")[0]
        styles = {f"{around}.{router}": "replicate" for router in ROUTERS}
        for shared in SHARED_EXPERTS:
            linears = {f"{around}.{shared}.{linear}": style for linear, style in SHARED_STYLES.items()}
            styles |= linears if linears.keys() <= modules.keys() else {}
        styles = {added: style for added, style in styles.items() if added in modules and added not in plan.styles}
        if plan.styles.get(name) != "replicate":
            styles[name] = "experts"
        plan.styles.update(styles)
        plan.patterns.update({added: added.removeprefix(f"{around}.") for added in styles})
    # A tp_plan names the weights of experts, too.
    return replace(plan, unused=tuple(p for p in plan.unused if not any(matches(p, weight) for weight in weights)))


def _with_ends(model: nn.Module, plan: Plan) -> Plan:
    """Add the model's embedding and head, which tp_plans and the table of known layers often leave out."""
    if not any(style != "replicate" for style in plan.styles.values()):
        return plan
    ends = (("get_input_embeddings", "embedding_rowwise"), ("get_output_embeddings", "colwise_gather_output"))
    for getter, style in ends:
        try:
            module = innermost(getattr(model, getter)())
        except Exception:  # the method is missing, or raises for a model without such a module
            continue
        if style == "embedding_rowwise" and not isinstance(module, nn.Embedding):
            continue  # it embeds images or audio
        weight = getattr(module, "weight", None)
        for name in model_names(model):
            candidate = innermost(model.get_submodule(name))
            # Encoder and decoder may have two modules that share one weight.
            tied = (
                weight is not None and type(candidate) is type(module) and candidate._parameters.get("weight") is weight
            )
            if (candidate is module or tied) and name not in plan.styles:
                plan.styles[name], plan.patterns[name] = style, f"{getter}()"
    return plan

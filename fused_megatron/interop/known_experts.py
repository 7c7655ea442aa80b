"""Recognition of the experts of transformers' models, and the reasons why the experts of a model cannot be split."""

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# Names of the two weights: [E, 2F, H], gate rows before up rows of each expert, and [E, H, F].
WEIGHTS = ("gate_up_proj", "down_proj")
# Arguments of the forward: tokens [T, H]; experts [T, K] and weights [T, K] of each token.
_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
# Attributes by which transformers' experts describe their weights, and the values that are known.
_INTERFACE = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
_GATE = "_default_apply_gate"
_ACTIVATIONS = {
    "swiglu": F.silu,
    "geglu": lambda x: F.gelu(x, approximate="tanh"),
}
# Names of modules beside the experts of a layer: routers and gates, which every rank needs whole, and dense experts.
ROUTERS = ("gate", "router", "shared_expert_gate")
SHARED_EXPERTS = ("shared_expert", "shared_experts")
SHARED_STYLES = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
_ADAPTED = "an adapter (LoRA) or a parametrization changes its weights"


class ExpertSizes(NamedTuple):
    """Sizes of the experts of one layer: their number E, H and F, and the name of their gated activation."""

    num_experts: int
    hidden_size: int
    ffn_size: int
    activation: str


def holds_experts(module: nn.Module) -> bool:
    """Whether a module looks like the experts of a layer, known or not: it stacks weights of all experts."""
    stacked = [name for name, p in module._parameters.items() if p is not None and p.dim() == 3]
    return bool(stacked) and (any(name in WEIGHTS for name in stacked) or _class_name(module).endswith("Experts"))


def is_adapted(module: nn.Module) -> bool:
    """Whether a wrapper or a parametrization around experts makes their weights."""
    parametrized = set(getattr(module, "parametrizations", ()))
    base = getattr(module, "base_layer", None)
    return bool(parametrized & {*WEIGHTS}) or (
        isinstance(base, nn.Module) and (holds_experts(base) or is_adapted(base))
    )


def expert_sizes(module: Any) -> ExpertSizes:
    """Return the sizes of known experts (experts_obstacle is empty)."""
    num_experts, hidden_size, ffn_size = module._parameters["down_proj"].shape
    return ExpertSizes(num_experts, hidden_size, ffn_size, _activation(module))


def experts_obstacle(module: Any) -> str:
    """Return why the experts of a module cannot be split; empty if they can.

    A module is known if its class declares transformers' experts interface with the forms of _INTERFACE. transformers
    itself may then run other code than the class's forward, so that the interface defines what the experts compute.
    """
    kind = type(module).__name__
    if is_adapted(module):
        return f"{_ADAPTED} (merge it first, or leave the experts out of it)"
    if not holds_experts(module):
        return f"a {kind} has no weights {WEIGHTS[0]} and {WEIGHTS[1]} of 3 dims"
    found = {name: getattr(module, name, None) for name in _INTERFACE}
    wrong = next((name for name, value in _INTERFACE.items() if found[name] != value), None)
    if wrong is not None:
        return f"a {kind} has {wrong}={found[wrong]}, where {_INTERFACE[wrong]} is known"
    if set(module._parameters) != set(WEIGHTS) or module._buffers:
        return f"a {kind} has other weights than {WEIGHTS[0]} and {WEIGHTS[1]}"
    num_experts, hidden_size, ffn_size = module._parameters[WEIGHTS[1]].shape
    if tuple(module._parameters[WEIGHTS[0]].shape) != (num_experts, 2 * ffn_size, hidden_size):
        return f"{WEIGHTS[0]} of the {kind} is not [E, 2F, H] where {WEIGHTS[1]} is [E, H, F]"
    if tuple(inspect.signature(type(module).forward).parameters)[1:] != _ARGUMENTS:
        return f"the forward of a {kind} does not take {', '.join(_ARGUMENTS)}"
    if getattr(type(module), "_apply_gate").__name__ != _GATE or not _activation(module):  # noqa: B009
        return f"the activation of a {kind} is not silu(gate) * up or gelu(gate) * up"
    return ""


def _class_name(module: nn.Module) -> str:
    return type(module).__name__


def _activation(module: Any) -> str:
    """Return the name of the gated activation; empty if its function is not known."""
    values = torch.linspace(-4.0, 4.0, 33, device="cpu")
    try:
        found = module.act_fn(values)
    except Exception:  # the function is not ours and may raise anything
        return ""
    return next((name for name, known in _ACTIVATIONS.items() if torch.allclose(found, known(values))), "")

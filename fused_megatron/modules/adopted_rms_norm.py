"""AdoptedRMSNorm: the fused forward for RMS norms that a model defines in a class of its own."""

import inspect
from typing import Any

import torch
from torch import nn

from fused_megatron import ops

# Attribute names for eps in such classes.
EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
# Rows of the input for the comparison; few, since every norm of a model is compared.
_ROWS = 3


class AdoptedRMSNorm(nn.Module):
    """Replacement for norms such as LlamaRMSNorm: a parameter `weight` [H], a number eps, y = weight * x / rms(x).

    Never constructed: replace_modules changes the class of a module in place, which keeps its parameter, hooks, name
    and state_dict.

    Attributes:
        weight: [H].
        adopted_eps: added to the mean square.
        zero_centered_weight: the factor is 1 + weight (Gemma).
        promotes: the result has the common dtype of x and weight, as in Llama; else the dtype of x, as in Gemma.

    Communication, Memory, Numerics: as fused_megatron.ops.rms_norm.
    """

    weight: nn.Parameter
    adopted_eps: float
    zero_centered_weight: bool
    promotes: bool

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise hidden_states [..., H]; returns the same shape."""
        return self._normalise(hidden_states, self.weight)

    def _normalise(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.promotes:
            x = x.to(torch.promote_types(x.dtype, weight.dtype))
        return ops.rms_norm(x, weight, self.adopted_eps, zero_centered_weight=self.zero_centered_weight)

    def extra_repr(self) -> str:
        """Return the text that print(model) shows."""
        return f"{tuple(self.weight.shape)}, eps={self.adopted_eps}, zero_centered_weight={self.zero_centered_weight}"


def adoption(module: nn.Module) -> dict[str, Any] | str:
    """Return the attributes with which AdoptedRMSNorm computes the same as the module, or why there are none.

    The class name does not matter: a copy of the module with random weights runs forward and backward, on inputs small
    enough that eps matters and on larger ones, and its results are compared with AdoptedRMSNorm's.
    """
    kind = type(module)
    eps = next((v for name in EPS_NAMES if isinstance(v := getattr(module, name, None), float)), None)
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or parameters["weight"].dim() != 1 or eps is None:
        return "not an RMS norm with one weight and a number eps"
    if next(module.buffers(), None) is not None or next(module.children(), None) is not None:
        return "has buffers or modules of its own"
    arguments = list(inspect.signature(kind.forward).parameters)[1:]
    if len(arguments) != 1:
        return f"its forward takes more than x: {', '.join(arguments)}"
    try:
        reason: dict[str, Any] | str = _compare(module, eps)
    except Exception as error:  # a foreign forward may raise anything: the module is not replaced
        reason = f"its forward could not be tried: {type(error).__name__}: {error}"
    return reason


def _twin(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    """Return a copy of the module with another weight and without its hooks, which must not run here."""
    twin = type(module).__new__(type(module))
    twin.__dict__ = {**nn.Module().__dict__, **_plain(module), "training": module.training}
    twin.weight = nn.Parameter(weight.clone())
    return twin


def _plain(module: nn.Module) -> dict[str, Any]:
    own = nn.Module().__dict__
    return {name: value for name, value in module.__dict__.items() if name not in own}


def _compare(module: nn.Module, eps: float) -> dict[str, Any] | str:
    generator = torch.Generator().manual_seed(0)
    width = module.get_parameter("weight").shape[0]
    draw = torch.randn(4, _ROWS, width, generator=generator, dtype=torch.float32, device="cpu")
    weight = draw[3, 0]
    upstream = draw[2]
    for zero_centered in (False, True):
        attributes = {"adopted_eps": eps, "zero_centered_weight": zero_centered, "promotes": False}
        scales = (max(eps, 1e-12) ** 0.5, 1.0)
        if all(_agrees(module, attributes, weight, draw[i] * scales[i], upstream) for i in range(2)):
            with torch.no_grad():
                result = _twin(module, weight)(draw[1].to(torch.bfloat16))
            return {**attributes, "promotes": result.dtype == torch.float32}
    return "its result is not weight * x / rms(x), nor with 1 + weight"


def _agrees(
    module: nn.Module, attributes: dict[str, Any], weight: torch.Tensor, x: torch.Tensor, upstream: torch.Tensor
) -> bool:
    results = []
    adopted = AdoptedRMSNorm()
    adopted.__dict__.update(attributes)
    adopted.weight = nn.Parameter(weight.clone())
    for norm in (_twin(module, weight), adopted):
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            y = norm(leaf)
            y.backward(upstream)
        results.append((y.detach(), leaf.grad, norm.get_parameter("weight").grad))
    # Both sides sum H float32 terms, in different orders.
    return all(
        a is not None and b is not None and a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * b.abs().max())
        for a, b in zip(*results, strict=True)
    )

"""AdoptedRMSNorm: the fused forward of an RMS norm that a model brought along with a class of its own."""

import inspect
from typing import Any

import torch
from torch import nn

from fused_megatron import ops

# The names under which such classes keep eps.
EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
# Rows of the input that the check compares on; few, since every norm of a model is checked.
_ROWS = 3


class AdoptedRMSNorm(nn.Module):
    """Stands in for LlamaRMSNorm and its like: a parameter `weight` [H], a number eps, y = weight * x / rms(x).

    Never constructed: `adopt` turns a module into one in place, which keeps its parameter, hooks, name and state_dict.

    Attributes:
        weight: [H].
        adopted_eps: added to the mean square.
        zero_centered_weight: the factor is 1 + weight (Gemma).
        promotes: the result has the common dtype of x and weight, as in Llama; else that of x, as in Gemma.

    Communication, Memory, Numerics: as fused_megatron.ops.rms_norm.
    """

    weight: nn.Parameter
    adopted_eps: float
    zero_centered_weight: bool
    promotes: bool

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise [..., H]; returns the same shape."""
        return self._normalise(hidden_states, self.weight)

    def _normalise(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.promotes:
            x = x.to(torch.promote_types(x.dtype, weight.dtype))
        return ops.rms_norm(x, weight, self.adopted_eps, zero_centered_weight=self.zero_centered_weight)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{tuple(self.weight.shape)}, eps={self.adopted_eps}, zero_centered_weight={self.zero_centered_weight}"


def adoption(module: nn.Module) -> dict[str, Any] | str:
    """The attributes with which AdoptedRMSNorm computes what the module computes, or why it cannot.

    The class name decides nothing: a twin of the module with random weights is run, forward and backward, on inputs so
    small that eps counts and so large that it does not, and compared.
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
    except Exception as error:  # whatever a stranger's forward raises: it is left as it is
        reason = f"its forward could not be tried: {type(error).__name__}: {error}"
    return reason


def _twin(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    """The module with another weight; without its hooks, which nobody asked to run."""
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
    weight, upstream = draw[3, 0], draw[2]
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
    # float32 on both sides, sums of H terms in another order.
    return all(
        a is not None and b is not None and a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * b.abs().max())
        for a, b in zip(*results, strict=True)
    )

"""Activations of experts, times the probability of each row."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from fused_megatron.ops.weighted_swiglu import weighted_swiglu, weighted_swiglu_gradients
from fused_megatron.reference import bias_geglu, bias_gelu
from fused_megatron.reference.precision import widen

_RAW = torch.ops.fused_megatron


class WeightedActivation(NamedTuple):
    """Activation of each row times a weight, without autograd.

    Attributes:
        forward: (h [n, F'], weight [n] float32) -> a [n, F] = activation(h) * weight, dtype of h.
        backward: (da [n, F], h, weight) -> (dh [n, F'], dweight [n], a [n, F]).
    """

    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _raw(name: str, flag: bool, reference: Any, h: torch.Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return (forward of h, backward of (da, h)) of an op of the package; float64 runs on the reference."""
    kernels = reference if h.dtype == torch.float64 else _RAW
    forward, backward = getattr(kernels, f"{name}_forward"), getattr(kernels, f"{name}_backward")
    return lambda h: forward(h, None, flag), lambda da, h: backward(da, h, None, flag, True, False)[0]


def _forward(raw: Callable[..., Any], h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    activation, _ = raw(h)
    return (widen(activation(h)) * weight[:, None]).to(h.dtype)


def _backward(
    raw: Callable[..., Any], da: torch.Tensor, h: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    activation, gradient = raw(h)
    a, wide = widen(activation(h)), widen(da)
    dh = gradient((wide * weight[:, None]).to(h.dtype), h)
    return dh, (wide * a).sum(1).to(weight.dtype), (a * weight[:, None]).to(h.dtype)


def _of_op(name: str, flag: bool, reference: Any) -> WeightedActivation:
    raw = partial(_raw, name, flag, reference)
    return WeightedActivation(partial(_forward, raw), partial(_backward, raw))


GATED = {
    "swiglu": WeightedActivation(weighted_swiglu, weighted_swiglu_gradients),
    "geglu": _of_op("bias_geglu", True, bias_geglu),
}
PLAIN = {
    "gelu": _of_op("bias_gelu", True, bias_gelu),
    "gelu_exact": _of_op("bias_gelu", False, bias_gelu),
}
ACTIVATIONS = {**GATED, **PLAIN}

"""gelu(x + bias), fused, with its gradients."""

from typing import Any

import torch

from fused_megatron.ops.registration import define_op
from fused_megatron.reference import bias_gelu as reference

_forward = define_op(
    "bias_gelu_forward(Tensor x, Tensor? bias) -> Tensor",
    reference=reference.bias_gelu_forward,
    fake=lambda x, bias: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_backward = define_op(
    "bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias) -> (Tensor dx, Tensor dbias)",
    reference=reference.bias_gelu_backward,
    fake=lambda dy, x, bias: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
    ),
)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, bias)
        return _forward(x, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, bias = ctx.saved_tensors
        dx, dbias = _backward(dy, x, bias)
        return dx, dbias if bias is not None else None


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _BiasGelu.apply(x, bias)

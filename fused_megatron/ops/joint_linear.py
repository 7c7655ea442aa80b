"""Products of one input with several weights, side by side in one result."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.checks import InputError, check, check_dtype, check_same_device
from fused_megatron.ops.autograd_function import AutogradFunction, is_differentiated
from fused_megatron.ops.product import product
from fused_megatron.ops.registration import FLOAT_DTYPES


class _JointLinear(AutogradFunction):
    op = "ops.joint_linear"

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, *weights)
        return _forward(x, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        needs_dx, *needs_dw = ctx.needs_input_grad
        dy = dy.reshape(-1, dy.shape[-1])
        dx = _dx(dy, weights).view(x.shape) if needs_dx else None
        return dx, *_dw(dy, x.reshape(-1, x.shape[-1]), weights, needs_dw)


def _columns(weights: Sequence[torch.Tensor]) -> list[slice]:
    """Return the columns of the result that belong to each weight."""
    ends = list(itertools.accumulate(len(weight) for weight in weights))
    return [slice(end - len(weight), end) for end, weight in zip(ends, weights, strict=True)]


def _as_one(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return weights that follow each other in memory as one matrix without a copy; None if they do not."""
    first, width = weights[0], weights[0].shape[1]
    address, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for weight in weights:
        if not weight.is_contiguous() or weight.data_ptr() != address or weight.dtype != first.dtype:
            return None
        if weight.untyped_storage().data_ptr() != storage:
            return None
        address += weight.numel() * weight.element_size()
    return first.detach().as_strided((sum(len(weight) for weight in weights), width), (width, 1))


def _forward(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    whole = _as_one(weights)
    if whole is not None:
        return product(x, whole)
    columns = _columns(weights)
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty((rows.shape[0], columns[-1].stop))
    for part, weight in zip(columns, weights, strict=True):
        product(rows, weight, out=y[:, part])
    return y.view(*x.shape[:-1], y.shape[-1])


def _dx(dy: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    whole = _as_one(weights)
    if whole is not None:
        return product(dy, whole.t())
    dx = dy.new_empty((dy.shape[0], weights[0].shape[1]))
    for i, (part, weight) in enumerate(zip(_columns(weights), weights, strict=True)):
        product(dy[:, part], weight.t(), out=dx, add=i > 0)
    return dx


def _dw(
    dy: torch.Tensor, x: torch.Tensor, weights: Sequence[torch.Tensor], needs: Sequence[bool]
) -> list[torch.Tensor | None]:
    columns = _columns(weights)
    if all(needs):
        dw = product(dy.t(), x.t())
        return [dw[part] for part in columns]
    return [product(dy[:, c].t(), x.t()) if needed else None for c, needed in zip(columns, needs, strict=True)]


def joint_linear(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Multiply one input by several weights; equals torch.cat([F.linear(x, w) for w in weights], -1), without a copy.

        y  [..., O1 + O2]     = [x @ w1.T, x @ w2.T]
        dx [..., I]           = dy1 @ w1 + dy2 @ w2
        dw [O1 + O2, I]       = dy.T @ x, one product; its rows are the gradients of w1 and w2

    Args:
        x: [..., I] float32, bfloat16, float16 or float64.
        weights: one or more [O, I] in the dtype of x; under autocast all are cast to the dtype of autocast.

    Returns:
        [..., sum of all O] in the dtype of x (of autocast), contiguous.

    Raises:
        InputError: no weights, shapes or devices that do not fit.
        TypeError: wrong dtypes.

    Communication: none.

    Memory: saves x and the weights. Weights that follow each other in memory take part in one product forward and one
    for dx; others in one product each, which writes its columns of the result.

    Numerics: as torch.nn.functional.linear. dx of separate weights is rounded after each product. float64 runs in
    plain PyTorch; the backward of other dtypes cannot be differentiated again.
    """
    check(len(weights) > 0, "weights=[] must have at least one weight")
    check_dtype("x", x, FLOAT_DTYPES)
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
    for i, weight in enumerate(weights):
        if weight.dim() != 2 or x.dim() == 0 or weight.shape[1] != x.shape[-1]:
            raise InputError(
                f"weights[{i}].shape={tuple(weight.shape)} must be [O, {x.shape[-1] if x.dim() else 'I'}], "
                f"for x.shape={tuple(x.shape)}"
            )
        check_dtype(f"weights[{i}]", weight, (x.dtype,))
        check_same_device(f"weights[{i}]", weight, "x", x)
    if x.dtype == torch.float64:
        return torch.cat([product(x, weight) for weight in weights], -1)
    if not is_differentiated():
        return _forward(x, weights)
    y: torch.Tensor = _JointLinear.apply(x, *weights)
    return y

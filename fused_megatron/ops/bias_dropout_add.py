"""Fused residual + dropout(x + bias) with its gradients; backward draws the mask again instead of storing it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.checks import InputError, check, check_dtype, check_same_device, check_shape
from fused_megatron.ops.autograd_function import AutogradFunction, is_differentiated
from fused_megatron.ops.registration import FLOAT_DTYPES, define_op
from fused_megatron.reference import bias_dropout_add as reference

_Rows = tuple[int, int, int, int]


def _fake_backward(
    dy: torch.Tensor, bias: torch.Tensor | None, rng_state: torch.Tensor | None, x_dtype: torch.dtype, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    need_dx, need_dbias = rest[-2:]
    dx = dy.new_empty(dy.shape if need_dx else 0, dtype=x_dtype)
    return dx, dy.new_empty(0) if bias is None or not need_dbias else bias.new_empty(bias.shape)


# rng_state is None if nothing is random: p is 0 or 1. The four integers are `rows` of reference/bias_dropout_add.py.
_forward = define_op(
    "bias_dropout_add_forward(Tensor x, Tensor? bias, Tensor residual, Tensor? rng_state, float p,"
    " int inner, int start, int stride0, int stride1) -> Tensor",
    reference=reference.bias_dropout_add_forward,
    fake=lambda x, bias, residual, *rest: torch.empty_like(residual, memory_format=torch.contiguous_format),
)
# backward takes bias only for its dtype.
_backward = define_op(
    "bias_dropout_add_backward(Tensor dy, Tensor? bias, Tensor? rng_state, ScalarType x_dtype, float p,"
    " int inner, int start, int stride0, int stride1, bool need_dx, bool need_dbias) -> (Tensor dx, Tensor dbias)",
    reference=reference.bias_dropout_add_backward,
    fake=_fake_backward,
)


class _BiasDropoutAdd(AutogradFunction):
    op = "ops.bias_dropout_add"

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        rng_state: torch.Tensor | None,
        p: float,
        rows: _Rows,
    ) -> torch.Tensor:
        ctx.save_for_backward(bias, rng_state)
        ctx.x_dtype = x.dtype
        ctx.p = p
        ctx.rows = rows
        return _forward(x, bias, residual, rng_state, p, *rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        bias, rng_state = ctx.saved_tensors
        need_dx, need_dbias, need_dresidual, *_ = ctx.needs_input_grad
        # Without dropout the gradient of x equals dy.
        same = ctx.p == 0.0 and ctx.x_dtype == dy.dtype
        dx, dbias = dy, None
        if need_dbias or (need_dx and not same):
            new_dx, dbias = _backward(
                dy, bias, rng_state, ctx.x_dtype, ctx.p, *ctx.rows, need_dx and not same, need_dbias
            )
            dx = dy if same else new_dx
        return (
            dx if need_dx else None,
            dbias if need_dbias else None,
            dy if need_dresidual else None,
            None,
            None,
            None,
        )


def bias_dropout_add(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    p: float = 0.1,
    training: bool = True,
    *,
    rng_state: torch.Tensor | None = None,
    full_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> torch.Tensor:
    """Add the bias, apply dropout, and add the residual in one pass over memory; no mask is stored.

    Equals residual + torch.nn.functional.dropout(x + bias, p, training), but draws another mask:

        y = residual + (x + bias) * factor,   factor = 1 / (1 - p) where kept, 0 where dropped

    The mask depends only on rng_state and on an element's index in the FULL tensor. So a shard, with its full_shape and
    offset, draws exactly its slice of the mask that one device would draw. p is rounded to a multiple of 2^-16, also in
    the factor. The element with (row-major) global index g is kept if bits(g) >= p * 2^16, where, with (seed, offset) =
    rng_state,

        bits(g) = half g % 8 of philox4x32_7(counter=(g // 8, offset), key=seed)

    are 16 random bits, the same on every device (reference/philox.py defines them).

    Args:
        x: [..., H] float32, bfloat16, float16 or float64; any strides (copied once if not contiguous).
        bias: [H], any of these dtypes, or None.
        residual: the shape of x; the dtype of x, or float32 with a 16-bit x, or float64.
        p: the probability that an element is dropped, in [0, 1], rounded to a multiple of 2^-16. 0 drops nothing and 1
            everything, exactly.
        training: False is p = 0.
        rng_state: int64 [2], (seed, offset), on the device of x; not written. None: drawn from torch's generator of
            that device, so that torch.manual_seed and activation checkpointing reproduce it. Pass the same rng_state
            on all ranks that hold shards of one tensor.
        full_shape: shape of the full tensor that x is a slice of, with the same number of dims; None: x is full.
        offset: first index of the slice in each dim; None: 0.

    Returns:
        y, the shape and dtype of residual, contiguous.

    Raises:
        InputError: wrong shapes, devices or p; a slice outside full_shape; or a slice cut along so many dims that its
            rows need more than two strides (every slice of [S, B, H] is supported; reshape other tensors).
        TypeError: a dtype that is not floating point, or a residual narrower than x.

    Communication: none.

    Memory: saves bias and the 16 bytes of rng_state for backward, not x and residual. The gradient of residual is dy
    itself, without a copy. For 16-bit tensors, forward moves 6 bytes per element, backward 4.

    Numerics: float32 inside, ONE rounding to the output's dtype. dbias is summed in float32 in a fixed order, so that
    runs agree bit for bit, on the CPU with any number of threads. A dropped element is multiplied by 0, as in torch: if
    it is NaN or infinite, the result is NaN. float64 runs on the PyTorch reference. No host synchronisation: a CUDA
    graph can capture the op. Backward cannot be differentiated again (except in float64).

    Paper: Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    if not 0.0 <= p <= 1.0:
        raise InputError(f"p={p} must be in [0, 1]")
    _check_tensors(x, bias, residual, rng_state)
    rows = reference.WHOLE
    if full_shape is not None:
        rows = _rows(tuple(x.shape), tuple(full_shape), (0,) * x.dim() if offset is None else tuple(offset))
    elif offset is not None:
        raise InputError("offset must come with full_shape, the shape of the whole tensor")
    p = float(p) if training else 0.0
    if p == 0.0 or p == 1.0:
        rng_state = None
    elif rng_state is None:
        rng_state = torch.randint(2**63 - 1, (2,), device=x.device)
    if torch.float64 in (x.dtype, residual.dtype, None if bias is None else bias.dtype):
        return reference.bias_dropout_add(x, bias, residual, rng_state, p, rows)
    if not is_differentiated():
        return _forward(x, bias, residual, rng_state, p, *rows)
    return _BiasDropoutAdd.apply(x, bias, residual, rng_state, p, rows)


def _check_tensors(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, rng_state: torch.Tensor | None
) -> None:
    check_dtype("x", x, FLOAT_DTYPES)
    if residual.dtype != x.dtype:
        wider = (torch.float64,) if x.dtype == torch.float32 else (torch.float32, torch.float64)
        check_dtype("residual", residual, (x.dtype,) if x.dtype == torch.float64 else (x.dtype, *wider))
    check_shape("residual", residual, x.shape)
    check_same_device("residual", residual, "x", x)
    if bias is not None:
        if x.dim() == 0:
            raise InputError("x.dim()=0 must be at least 1 when there is a bias")
        check_shape("bias", bias, x.shape[-1:])
        check_dtype("bias", bias, FLOAT_DTYPES)
        check_same_device("bias", bias, "x", x)
    if rng_state is not None:
        check_dtype("rng_state", rng_state, (torch.int64,))
        check_shape("rng_state", rng_state, (2,))
        check_same_device("rng_state", rng_state, "x", x)


def _rows(shape: tuple[int, ...], full_shape: tuple[int, ...], offset: tuple[int, ...]) -> _Rows:
    """Compute `rows` of reference/bias_dropout_add.py: where the rows of a slice begin in the full tensor."""
    for name, values in (("full_shape", full_shape), ("offset", offset)):
        check(len(values) == len(shape), f"{name}={values} must have {len(shape)} dims, as x has")
    for dim, (size, full, first) in enumerate(zip(shape, full_shape, offset, strict=True)):
        check(
            first >= 0 and first + size <= full,
            f"offset[{dim}]={first} must place x.shape[{dim}]={size} inside full_shape[{dim}]={full}",
        )
    start, stride = 0, 1
    outer: list[tuple[int, int]] = []  # (size, stride) of the merged dims before the last, innermost first
    for dim in reversed(range(len(shape))):
        start += offset[dim] * stride
        if dim < len(shape) - 1 and shape[dim] != 1:
            if outer and stride == outer[-1][0] * outer[-1][1]:
                outer[-1] = (outer[-1][0] * shape[dim], outer[-1][1])
            else:
                outer.append((shape[dim], stride))
        stride *= full_shape[dim]
    check(
        len(outer) <= 2,
        f"x.shape={shape} in full_shape={full_shape} must be cut along fewer dims: its rows need {len(outer)} strides, "
        "and at most 2 are supported (reshape it, or call the op once for each part)",
    )
    if not outer:
        return 1, start, 0, 0
    if len(outer) == 1:
        return 1, start, outer[0][1], 0
    return max(outer[0][0], 1), start, outer[1][1], outer[0][1]

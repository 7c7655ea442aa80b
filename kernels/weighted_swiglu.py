"""Triton kernels of weighted_swiglu. The math is in fused_megatron/reference/weighted_swiglu.py.

Triton, unlike the other activations: the gradient of a weight is a sum over a row. ALIGN is the largest power of two,
up to 16 bytes, that divides the width of a row; widths are passed in units of ALIGN, so that accesses are wide.
"""

# mypy: allow-untyped-defs
# (The arguments of a Triton kernel have no Python types.)

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl

_ELEMENTS = 2048  # of a tile of rows


@triton.jit
def _silu(gate):
    """Return silu(gate) and its slope; both are finite where the gate is."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    value = gate * sigmoid
    return value, sigmoid + value * (1.0 - sigmoid)


@triton.jit
def _forward_kernel(
    x_ptr,  # [num_rows, 2 width], in
    weight_ptr,  # float32 [num_rows], in
    y_ptr,  # [num_rows, width], out
    num_rows,
    width_units,  # width / ALIGN
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: ROWS rows."""
    width = width_units * ALIGN
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < num_rows
    weight = tl.load(weight_ptr + row, mask=real, other=0.0)[:, None]
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)[None, :]
        mask = real[:, None] & (columns < width)
        gate = tl.load(x_ptr + 2 * row[:, None] * width + columns, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + (2 * row[:, None] + 1) * width + columns, mask=mask, other=0.0).to(tl.float32)
        value, _ = _silu(gate)
        y = value * up * weight
        tl.store(y_ptr + row[:, None] * width + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,  # [num_rows, width], in
    x_ptr,  # [num_rows, 2 width], in
    weight_ptr,  # float32 [num_rows], in
    dx_ptr,  # [num_rows, 2 width], out
    dweight_ptr,  # float32 [num_rows], out
    y_ptr,  # [num_rows, width], out; unused without NEED_Y
    num_rows,
    width_units,  # width / ALIGN
    NEED_Y: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: ROWS rows."""
    width = width_units * ALIGN
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < num_rows
    weight = tl.load(weight_ptr + row, mask=real, other=0.0)[:, None]
    dweight = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)[None, :]
        mask = real[:, None] & (columns < width)
        at_gate = 2 * row[:, None] * width + columns
        gate = tl.load(x_ptr + at_gate, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + at_gate + width, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * width + columns, mask=mask, other=0.0).to(tl.float32)
        value, slope = _silu(gate)
        dweight += tl.sum(dy * value * up, 1)
        tl.store(dx_ptr + at_gate, (dy * up * weight * slope).to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + at_gate + width, (dy * value * weight).to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_Y:
            y = value * up * weight
            tl.store(y_ptr + row[:, None] * width + columns, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + row, dweight, mask=real)


def weighted_swiglu_forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up * weight."""
    x = x.contiguous()
    y = x.new_empty((x.shape[0], x.shape[1] // 2))
    if len(y):
        with _on(x):
            grid, units, tile = _launch(y)
            _forward_kernel[grid](x, weight.contiguous(), y, len(y), units, **tile)
    return y


def weighted_swiglu_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_y: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dx, dweight, and y if it is needed."""
    if dy.shape != (x.shape[0], x.shape[1] // 2) or dy.dtype != x.dtype:
        raise RuntimeError("dy must be [N, F] in the dtype of x")
    dy = dy.contiguous()
    x = x.contiguous()
    dx = torch.empty_like(x)
    dweight = weight.new_empty(weight.shape)
    y = x.new_empty(dy.shape if need_y else 0)
    if len(dy):
        with _on(x):
            grid, units, tile = _launch(dy)
            _backward_kernel[grid](dy, x, weight.contiguous(), dx, dweight, y, len(dy), units, NEED_Y=need_y, **tile)
    return dx, dweight, y


def _launch(y: torch.Tensor) -> tuple[tuple[int], int, dict[str, Any]]:
    """Return the grid, the width in units of ALIGN, and the sizes and options of a tile."""
    num_rows, width = y.shape
    block = min(_ELEMENTS, max(16, triton.next_power_of_2(width)))
    rows = _ELEMENTS // block
    align = math.gcd(width, 16 // y.element_size()) if width else 1
    tile = {"ALIGN": align, "ROWS": rows, "BLOCK": block, "num_warps": 4, "enable_fp_fusion": True}
    return (triton.cdiv(num_rows, rows),), width // align, tile


def _on(x: torch.Tensor) -> Any:
    """Make the device of x the current device, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

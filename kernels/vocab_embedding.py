"""Triton kernels of vocab_embedding. The math is in fused_megatron/reference/vocab_embedding.py.

Backward sorts the tokens by their row, and a program sums the tokens of one row: no atomics, and the same bits in every
run. ALIGN is the largest power of two, up to 16 bytes, that divides the width of a row; widths are passed in units of
ALIGN, so that accesses are wide.
"""

# mypy: allow-untyped-defs
# (The arguments of a Triton kernel have no Python types.)

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl

_COLUMNS = 1024  # of a program
_TOKENS = 8  # that a program of backward has in flight


@triton.jit
def _forward_kernel(
    ids_ptr,  # int32 or int64 [num_tokens], in
    weight_ptr,  # [num_rows, width], in
    out_ptr,  # [num_tokens, width], out
    local_ptr,  # int64 [num_tokens], out
    first_row,
    num_rows,
    vocab_size,
    width_units,  # width / ALIGN
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK columns of a token."""
    width = width_units * ALIGN
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(ids_ptr + token).to(tl.int64)
    row = number - first_row
    owned = (row >= 0) & (row < num_rows)
    known = (number >= 0) & (number < vocab_size)
    if tl.program_id(1) == 0:
        tl.store(local_ptr + token, tl.where(owned, row, num_rows))
    # A row of another rank has no columns here.
    values = tl.load(weight_ptr + row * width + columns, mask=columns < tl.where(owned, width, 0), other=0.0)
    values += tl.where(owned | known, 0.0, float("nan"))
    tl.store(out_ptr + token * width + columns, values.to(out_ptr.dtype.element_ty), mask=columns < width)


@triton.jit
def _backward_kernel(
    dy_ptr,  # [num_tokens, width], in
    rows_ptr,  # int64 [num_tokens], ascending, in
    tokens_ptr,  # int64 [num_tokens], the token of each sorted row, in
    total_ptr,  # float32 [num_rows, width], in and out
    num_tokens,
    num_rows,
    width_units,  # width / ALIGN
    ALIGN: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK columns of a row, if the program's place is the row's first."""
    width = width_units * ALIGN
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place)
    before = tl.load(rows_ptr + tl.maximum(place - 1, 0))
    if (row < num_rows) & ((place == 0) | (row != before)):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = columns < width
        steps = tl.arange(0, TOKENS)
        total = tl.zeros([BLOCK], tl.float32)
        count = TOKENS
        while count == TOKENS:
            same = tl.load(rows_ptr + place + steps, mask=place + steps < num_tokens, other=-1) == row
            token = tl.load(tokens_ptr + place + steps, mask=same, other=0)
            values = tl.load(
                dy_ptr + token[:, None] * width + columns[None, :], mask=same[:, None] & mask[None, :], other=0.0
            )
            total += tl.sum(values.to(tl.float32), axis=0)
            count = tl.sum(same.to(tl.int32), axis=0)
            place += TOKENS
        address = total_ptr + row * width + columns
        tl.store(address, tl.load(address, mask=mask, other=0.0) + total, mask=mask)


def vocab_embedding_forward(
    ids: torch.Tensor, weight: torch.Tensor, first_row: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of this rank's ids, and the rows' numbers."""
    if weight.dim() != 2 or ids.device != weight.device:
        raise RuntimeError("weight must be [V / R, H], on the device of ids")
    ids, weight = ids.contiguous(), weight.contiguous()
    partial = weight.new_empty((*ids.shape, weight.shape[1]))
    local = torch.empty(ids.shape, dtype=torch.int64, device=ids.device)
    if partial.numel():
        with _on(ids):
            grid, units, tile = _launch(ids.numel(), weight)
            _forward_kernel[grid](
                ids, weight, partial, local, first_row, weight.shape[0], vocab_size, units, num_warps=4, **tile
            )
    return partial, local


def vocab_embedding_backward_(dy: torch.Tensor, local: torch.Tensor, total: torch.Tensor) -> None:
    """Add the rows of dy to the rows of total."""
    if dy.shape != (*local.shape, total.shape[1]) or total.dtype != torch.float32 or not total.is_contiguous():
        raise RuntimeError("dy must be [.., H] for local [..], and total [V / R, H] float32, contiguous")
    if dy.numel() == 0:
        return
    dy = dy.contiguous()
    rows, tokens = torch.sort(local.flatten(), stable=True)
    with _on(dy):
        grid, units, tile = _launch(rows.numel(), dy)
        _backward_kernel[grid](
            dy, rows, tokens, total, rows.numel(), total.shape[0], units, TOKENS=_TOKENS, num_warps=4, **tile
        )


def _launch(num_tokens: int, x: torch.Tensor) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """Return the grid, the width in units of ALIGN, and the sizes of a tile."""
    width = x.shape[-1]
    block = min(_COLUMNS, max(16, triton.next_power_of_2(width)))
    align = math.gcd(width, 16 // x.element_size())
    return (num_tokens, triton.cdiv(width, block)), width // align, {"ALIGN": align, "BLOCK": block}


def _on(x: torch.Tensor) -> Any:
    """Make the device of x the current device, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

"""Triton kernels of expert_permutation: a counting sort, the copy of tokens to their places, and the sum back.

The sort cuts the pairs of tokens and experts into parts. One kernel counts the pairs of each expert in each part, one
sums the counts of earlier parts, and one finds the place of each pair: behind the pairs of lower experts, of the same
expert in earlier parts, and of the same expert earlier in its part. There are no atomic additions.

ALIGN is the largest power of two, up to 16 bytes, that divides the width of a row. Widths are passed in units of ALIGN,
so that the compiler sees the alignment of every row, and uses wide accesses.
"""

# mypy: allow-untyped-defs
# (The arguments of a Triton kernel have no Python types.)

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl

_PART = 256  # pairs of a part
_CHUNK = 32  # pairs that are compared with a part at a time
_EXPERTS = 32  # experts of a program of the second kernel
_PARTS = 64  # parts that it sums at a time
_ELEMENTS = 2048  # of a tile of rows


@triton.jit
def _bins(experts_ptr, pair, num_pairs, num_experts):
    """Return the experts of pairs: num_experts for a dropped pair, -1 beyond the last pair."""
    expert = tl.load(experts_ptr + pair, mask=pair < num_pairs, other=0)
    kept = (expert >= 0) & (expert < num_experts)
    return tl.where(pair < num_pairs, tl.where(kept, expert, num_experts), -1).to(tl.int32)


@triton.jit
def _count_kernel(
    experts_ptr,  # int64 [num_pairs], in
    counts_ptr,  # int32 [parts, num_bins], out
    num_pairs,
    num_experts,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one part."""
    part = tl.program_id(0).to(tl.int64)
    expert = _bins(experts_ptr, part * PART + tl.arange(0, PART), num_pairs, num_experts)
    num_bins = num_experts + 1
    for first in range(0, num_bins, BLOCK):
        bins = first + tl.arange(0, BLOCK)
        counts = tl.sum((bins[:, None] == expert[None, :]).to(tl.int32), 1)
        tl.store(counts_ptr + part * num_bins + bins, counts, mask=bins < num_bins)


@triton.jit
def _merge_kernel(
    counts_ptr,  # int32 [parts, num_bins], in
    starts_ptr,  # int64 [parts, num_bins], out: the pairs of the expert in earlier parts
    totals_ptr,  # int64 [num_bins], out
    parts,
    num_bins,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK experts."""
    bins = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        offsets = part.to(tl.int64)[:, None] * num_bins + bins[None, :]
        inside = (part < parts)[:, None] & (bins < num_bins)[None, :]
        counts = tl.load(counts_ptr + offsets, mask=inside, other=0).to(tl.int64)
        starts = total[None, :] + tl.cumsum(counts, 0) - counts
        tl.store(starts_ptr + offsets, starts, mask=inside)
        total += tl.sum(counts, 0)
    tl.store(totals_ptr + bins, total, mask=bins < num_bins)


@triton.jit
def _places_kernel(
    experts_ptr,  # int64 [num_pairs], in
    starts_ptr,  # int64 [parts, num_bins], in
    totals_ptr,  # int64 [num_bins], in
    rows_ptr,  # int64 [num_pairs], out
    places_ptr,  # int64 [num_pairs], out
    num_pairs,
    num_experts,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one part."""
    part = tl.program_id(0).to(tl.int64)
    num_bins = num_experts + 1
    bins = tl.arange(0, BLOCK)
    totals = tl.load(totals_ptr + bins, mask=bins < num_bins, other=0)
    base = tl.cumsum(totals, 0) - totals
    base += tl.load(starts_ptr + part * num_bins + bins, mask=bins < num_bins, other=0)
    index = tl.arange(0, PART)
    pair = part * PART + index
    expert = _bins(experts_ptr, pair, num_pairs, num_experts)
    earlier = tl.zeros([PART], tl.int32)
    for first in range(0, PART, CHUNK):
        other = first + tl.arange(0, CHUNK)
        others = _bins(experts_ptr, part * PART + other, num_pairs, num_experts)
        same = (expert[:, None] == others[None, :]) & (other[None, :] < index[:, None])
        earlier += tl.sum(same.to(tl.int32), 1)
    inside = pair < num_pairs
    place = tl.gather(base, tl.maximum(expert, 0), 0) + earlier
    tl.store(places_ptr + pair, place, mask=inside)
    tl.store(rows_ptr + place, pair, mask=inside)


@triton.jit
def _permute_kernel(
    x_ptr,  # [num_tokens, width], in
    places_ptr,  # int64 [num_tokens, K], in
    y_ptr,  # [num_rows, width], out
    num_tokens,
    num_rows,
    width_units,  # width / ALIGN
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK columns of ROWS tokens, which are read once."""
    width = width_units * ALIGN
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    real = token < num_tokens
    x = tl.load(x_ptr + token[:, None] * width + columns, mask=real[:, None] & (columns < width), other=0.0)
    for k in range(K):
        place = tl.load(places_ptr + token * K + k, mask=real, other=-1)
        kept = (place >= 0) & (place < num_rows)
        tl.store(y_ptr + place[:, None] * width + columns, x, mask=kept[:, None] & (columns < width))


@triton.jit
def _combine_kernel(
    y_ptr,  # [num_rows, width], in
    places_ptr,  # int64 [num_tokens, K], in
    weights_ptr,  # float32 [num_tokens, K], in; unused without HAS_WEIGHTS
    out_ptr,  # [num_tokens, width], out
    num_tokens,
    num_rows,
    width_units,  # width / ALIGN
    HAS_WEIGHTS: tl.constexpr,
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK columns of ROWS tokens."""
    width = width_units * ALIGN
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    real = token < num_tokens
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(K):
        place = tl.load(places_ptr + token * K + k, mask=real, other=-1)
        kept = (place >= 0) & (place < num_rows)
        mask = kept[:, None] & (columns < width)
        y = tl.load(y_ptr + place[:, None] * width + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            y *= tl.load(weights_ptr + token * K + k, mask=kept, other=0.0)[:, None]
        total += y
    mask = real[:, None] & (columns < width)
    tl.store(out_ptr + token[:, None] * width + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_backward_kernel(
    grad_ptr,  # [num_tokens, width], in
    y_ptr,  # [num_rows, width], in; unused without NEED_WEIGHTS
    places_ptr,  # int64 [num_tokens, K], in
    weights_ptr,  # float32 [num_tokens, K], in
    grad_y_ptr,  # [num_rows, width], out; unused without NEED_Y
    grad_weights_ptr,  # float32 [num_tokens, K], out; unused without NEED_WEIGHTS
    num_tokens,
    num_rows,
    width_units,  # width / ALIGN
    NEED_Y: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: ROWS tokens; their gradients are read once, BLOCK columns at a time."""
    width = width_units * ALIGN
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slots = tl.arange(0, K_BLOCK)[None, :]
    real = token < num_tokens
    dots = tl.zeros([ROWS, K_BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)[None, :]
        mask = real[:, None] & (columns < width)
        grad = tl.load(grad_ptr + token[:, None] * width + columns, mask=mask, other=0.0).to(tl.float32)
        for k in range(K):
            place = tl.load(places_ptr + token * K + k, mask=real, other=-1)
            kept = (place >= 0) & (place < num_rows)
            mask = kept[:, None] & (columns < width)
            offsets = place[:, None] * width + columns
            if NEED_WEIGHTS:
                y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                dots += tl.where(slots == k, tl.sum(y * grad, 1)[:, None], 0.0)
            if NEED_Y:
                weight = tl.load(weights_ptr + token * K + k, mask=kept, other=0.0)
                tl.store(grad_y_ptr + offsets, (weight[:, None] * grad).to(grad_y_ptr.dtype.element_ty), mask=mask)
    if NEED_WEIGHTS:
        # A dropped pair has the gradient 0 even if the gradient of its token is not finite.
        mask = real[:, None] & (slots < K)
        place = tl.load(places_ptr + token[:, None] * K + slots, mask=mask, other=-1)
        dots = tl.where((place >= 0) & (place < num_rows), dots, 0.0)
        tl.store(grad_weights_ptr + token[:, None] * K + slots, dots, mask=mask)


def expert_order(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows, places and counts, as the op of that name."""
    num_pairs = experts.numel()
    num_bins = num_experts + 1  # the last bin: pairs that are dropped
    parts = triton.cdiv(num_pairs, _PART)
    rows = experts.new_empty(num_pairs)
    places = experts.new_empty(experts.shape)
    totals = experts.new_empty(num_bins)
    counts = experts.new_empty((parts, num_bins), dtype=torch.int32)
    starts = experts.new_empty((parts, num_bins))
    with _on(experts):
        if parts:
            block = min(64, triton.next_power_of_2(num_bins))
            _count_kernel[(parts,)](experts, counts, num_pairs, num_experts, PART=_PART, BLOCK=block)
        _merge_kernel[(triton.cdiv(num_bins, _EXPERTS),)](
            counts, starts, totals, parts, num_bins, PARTS=_PARTS, BLOCK=_EXPERTS
        )
        if parts:
            sizes = {"PART": _PART, "CHUNK": _CHUNK, "BLOCK": triton.next_power_of_2(num_bins)}
            _places_kernel[(parts,)](
                experts, starts, totals, rows, places, num_pairs, num_experts, **sizes, num_warps=8
            )
    return rows, places, totals[:num_experts].clone()


def expert_permute(x: torch.Tensor, places: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the rows of tokens at the places of their pairs."""
    x = x.contiguous()
    width = x.shape[1]
    y = x.new_empty((num_rows, width))
    if x.numel():
        rows, tile = _tile(x, places)
        grid = (triton.cdiv(len(x), rows), triton.cdiv(width, tile["BLOCK"]))
        with _on(x):
            _permute_kernel[grid](x, places, y, len(x), num_rows, width // tile["ALIGN"], ROWS=rows, **tile)
    return y


def expert_combine(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return the (weighted) sums of the rows of tokens."""
    y = y.contiguous()
    width = y.shape[1]
    out = y.new_empty((len(places), width))
    if out.numel():
        rows, tile = _tile(y, places)
        grid = (triton.cdiv(len(places), rows), triton.cdiv(width, tile["BLOCK"]))
        with _on(y):
            _combine_kernel[grid](
                y,
                places,
                y if weights is None else weights.contiguous(),
                out,
                len(places),
                len(y),
                width // tile["ALIGN"],
                HAS_WEIGHTS=weights is not None,
                ROWS=rows,
                **tile,
            )
    return out


def expert_combine_backward(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    places: torch.Tensor,
    weights: torch.Tensor,
    num_rows: int,
    need_y: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return grad_y, and grad_weights if y is given; empty where not needed."""
    grad = grad.contiguous()
    y = None if y is None else y.contiguous()
    grad_y = grad.new_empty((num_rows, grad.shape[1]) if need_y else 0)
    grad_weights = weights.new_empty(0 if y is None else weights.shape)
    if places.numel():
        rows, tile = _tile(grad, places)
        with _on(grad):
            _combine_backward_kernel[(triton.cdiv(len(places), rows),)](
                grad,
                grad if y is None else y,
                places,
                weights.contiguous(),
                grad_y,
                grad_weights,
                len(places),
                num_rows,
                grad.shape[1] // tile["ALIGN"],
                NEED_Y=need_y,
                NEED_WEIGHTS=y is not None,
                K_BLOCK=triton.next_power_of_2(places.shape[1]),
                ROWS=rows,
                **tile,
            )
    return grad_y, grad_weights


def _tile(x: torch.Tensor, places: torch.Tensor) -> tuple[int, dict[str, Any]]:
    """Return the rows of a tile, and its other sizes and options, for rows like the rows of x."""
    width = x.shape[1]
    block = min(_ELEMENTS, max(16, triton.next_power_of_2(width)))
    align = math.gcd(width, 16 // x.element_size()) if width else 1
    options = {"K": places.shape[1], "ALIGN": align, "BLOCK": block, "num_warps": 4, "enable_fp_fusion": True}
    return _ELEMENTS // block, options


def _on(x: torch.Tensor) -> Any:
    """Make the device of x the current device, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

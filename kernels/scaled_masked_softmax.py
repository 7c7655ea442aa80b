"""Triton kernels of scaled_masked_softmax. The math is in fused_megatron/reference/scaled_masked_softmax.py.

A program keeps whole rows in registers: it reads each visible score once and writes each result once. Keys that
causal or window hide are skipped, in whole 16-byte pieces. A row too long for the registers of one block is spread over
a cluster of blocks (sm_90 and newer, Triton 3.9 and newer); a still longer row is read twice.

ALIGN is the largest power of two, up to 16 bytes, that divides the number of keys. Sizes are passed in units of ALIGN,
so that the compiler sees the alignment of every row and of every mask's edge, and uses wide accesses.
"""

# mypy: allow-untyped-defs
# (The arguments of a Triton kernel have no Python types.)

import contextlib
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_ELEMENTS_PER_THREAD = 32
_ROW_LIMIT = 16384  # keys in the registers of one block, with 16 warps
_CLUSTER_LIMIT = 8  # blocks of a cluster that every GPU with clusters supports
# Triton 3.6 and 3.7 cannot compile a reduction along a dim that is spread over a cluster (TritonGPUPlanCTAPass fails).
_CLUSTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
_ELEMENTS = 4096  # elements of a program with several short rows
# Lanes of the tile for rows that are read twice: 16 bytes per thread, two loads in flight.
_LANES = 512


@triton.jit
def _rows(num_queries, heads, ROWS: tl.constexpr, SHARED: tl.constexpr):
    """Return (row, query, outer, inner) of the ROWS rows of this program; the matrix is outer * heads + inner.

    SHARED: all heads use one mask. A program has ROWS heads of one query and reads the mask once; neighbouring programs
    have the other heads and find the mask in the cache. ROWS divides heads.

    64-bit divisions are slow: there is one per program; its rows use 32-bit divisions.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    step = tl.arange(0, ROWS)
    if SHARED:
        head_group = first // heads  # outer * num_queries + query
        query, outer = (head_group % num_queries).to(tl.int32), head_group // num_queries
        inner = (first % heads).to(tl.int32) + step
        return (outer * heads + inner) * num_queries + query, step * 0 + query, outer + step * 0, inner
    matrix = first // num_queries
    query = (first % num_queries).to(tl.int32) + step
    inner = (matrix % heads).to(tl.int32) + query // num_queries
    return first + step, query % num_queries, matrix // heads + inner // heads, inner % heads


@triton.jit
def _seen(query, num_queries, num_keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Return the range of keys [begin, end) that causal and window let a query see."""
    begin = query * 0
    end = begin + num_keys
    if CAUSAL:
        end = tl.minimum(tl.maximum(query + (num_keys - num_queries + 1), 0), num_keys)
    if WINDOW:
        begin = tl.maximum(query + (num_keys - num_queries + 1 - window), 0)
    return begin, end


@triton.jit
def _forward_kernel(
    x_ptr,  # [num_rows, num_keys], in
    mask_ptr,  # uint8 [num_rows, num_keys] by the strides below, in; 1 hides a key; unused without HAS_MASK
    y_ptr,  # [num_rows, num_keys], out
    num_rows,  # matrices * num_queries
    num_queries,
    key_units,  # num_keys / ALIGN
    scale,
    window,  # number of keys that a query sees, with WINDOW
    heads,  # size of the inner of the two matrix dims (batch, heads)
    mask_outer,  # strides of the mask in units of MASK_ALIGN: outer, inner, query
    mask_inner,
    mask_query,
    mask_key,  # in elements
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SHARED: tl.constexpr,
    ALIGN: tl.constexpr,
    MASK_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: ROWS whole rows."""
    num_keys = key_units * ALIGN
    rows, query, outer, inner = _rows(num_queries, heads, ROWS, SHARED)
    begin, end = _seen(query, num_queries, num_keys, window, CAUSAL, WINDOW)
    end = tl.where(rows < num_rows, end, 0)
    columns = tl.arange(0, BLOCK)[None, :]
    offsets = (rows * num_keys)[:, None] + columns
    readable = columns < ((end + (ALIGN - 1)) // ALIGN * ALIGN)[:, None]
    seen = columns < end[:, None]
    if WINDOW:
        readable &= columns >= (begin // ALIGN * ALIGN)[:, None]
        seen &= columns >= begin[:, None]
    score = tl.load(x_ptr + offsets, mask=readable, other=0.0).to(tl.float32) * scale
    if HAS_MASK:
        mask_ptr += columns.to(tl.int64) * mask_key
        if SHARED:
            head_group = tl.program_id(0).to(tl.int64) * ROWS // heads  # outer * num_queries + query
            units = head_group // num_queries * mask_outer + head_group % num_queries * mask_query
            hidden = tl.load(mask_ptr + units * MASK_ALIGN, mask=columns < num_keys, other=1)
        else:
            units = outer * mask_outer + inner.to(tl.int64) * mask_inner + query.to(tl.int64) * mask_query
            hidden = tl.load(mask_ptr + (units * MASK_ALIGN)[:, None], mask=readable, other=1)
        seen &= hidden == 0
    score = tl.where(seen, score, -float("inf"))
    maximum = tl.max(score, 1)
    # -inf minus -inf would be NaN: a row of only -inf is shifted by 0, and its exponentials are 0.
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    y = tl.exp2((score - shift[:, None]) * _LOG2E)
    total = tl.sum(y, 1)
    y *= tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
    y = tl.where(seen, y, 0.0)  # also in a row that contains a NaN
    inside = (columns < num_keys) & (rows < num_rows)[:, None]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr,  # [num_rows, num_keys], in
    y_ptr,  # [num_rows, num_keys], in
    dx_ptr,  # [num_rows, num_keys], out
    num_rows,  # matrices * num_queries
    num_queries,
    key_units,  # num_keys / ALIGN
    scale,
    window,  # number of keys that a query sees, with WINDOW
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: ROWS whole rows."""
    num_keys = key_units * ALIGN
    rows, query, _, _ = _rows(num_queries, 1, ROWS, False)
    begin, end = _seen(query, num_queries, num_keys, window, CAUSAL, WINDOW)
    end = tl.where(rows < num_rows, end, 0)
    columns = tl.arange(0, BLOCK)[None, :]
    offsets = (rows * num_keys)[:, None] + columns
    readable = columns < ((end + (ALIGN - 1)) // ALIGN * ALIGN)[:, None]
    seen = columns < end[:, None]
    if WINDOW:
        readable &= columns >= (begin // ALIGN * ALIGN)[:, None]
        seen &= columns >= begin[:, None]
    y = tl.load(y_ptr + offsets, mask=readable, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offsets, mask=readable, other=0.0).to(tl.float32)
    dy = tl.where(seen, dy, 0.0)
    dot = tl.sum(y * dy, 1)
    dx = tl.where(seen, scale * (y * (dy - dot[:, None])), 0.0)
    inside = (columns < num_keys) & (rows < num_rows)[:, None]
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _long_forward_kernel(
    x_ptr,  # [num_rows, num_keys], in
    mask_ptr,  # uint8 [num_rows, num_keys] by the strides below, in; 1 hides a key; unused without HAS_MASK
    y_ptr,  # [num_rows, num_keys], out
    num_queries,
    key_units,  # num_keys / ALIGN
    scale,
    window,  # number of keys that a query sees, with WINDOW
    heads,  # size of the inner of the two matrix dims (batch, heads)
    mask_outer,  # strides of the mask in units of MASK_ALIGN: outer, inner, query
    mask_inner,
    mask_query,
    mask_key,  # in elements
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN: tl.constexpr,
    MASK_ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One program: one row, read twice. A lane has VECTOR neighbouring columns and its own maximum and sum."""
    num_keys = key_units * ALIGN
    row = tl.program_id(0).to(tl.int64)
    query = (row % num_queries).to(tl.int32)
    begin, end = _seen(query, num_queries, num_keys, window, CAUSAL, WINDOW)
    readable_begin = begin // ALIGN * ALIGN
    readable_end = (end + (ALIGN - 1)) // ALIGN * ALIGN
    x_ptr += row * num_keys
    y_ptr += row * num_keys
    if HAS_MASK:
        matrix = row // num_queries
        units = matrix // heads * mask_outer + matrix % heads * mask_inner + query.to(tl.int64) * mask_query
        mask_ptr += units * MASK_ALIGN
    tile = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    maximum = tl.full([LANES], -float("inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for start in range(begin // (LANES * VECTOR) * (LANES * VECTOR), end, LANES * VECTOR):
        columns = start + tile
        readable = (columns >= readable_begin) & (columns < readable_end)
        seen = (columns >= begin) & (columns < end)
        score = tl.load(x_ptr + columns, mask=readable, other=0.0).to(tl.float32) * scale
        if HAS_MASK:
            seen &= tl.load(mask_ptr + columns.to(tl.int64) * mask_key, mask=readable, other=1) == 0
        score = tl.where(seen, score, -float("inf"))
        larger = tl.maximum(maximum, tl.max(score, 1))
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        total *= tl.exp2((maximum - shift) * _LOG2E)
        total += tl.sum(tl.exp2((score - shift[:, None]) * _LOG2E), 1)
        maximum = larger
    row_maximum = tl.max(maximum, 0)
    row_shift = tl.where(row_maximum == -float("inf"), 0.0, row_maximum)
    row_total = tl.sum(total * tl.exp2((maximum - row_shift) * _LOG2E), 0)
    inverse = tl.where(row_total == 0.0, 0.0, 1.0 / row_total)
    for start in range(0, num_keys, LANES * VECTOR):
        columns = start + tile
        readable = (columns >= readable_begin) & (columns < readable_end)
        seen = (columns >= begin) & (columns < end)
        score = tl.load(x_ptr + columns, mask=readable, other=0.0).to(tl.float32) * scale
        if HAS_MASK:
            seen &= tl.load(mask_ptr + columns.to(tl.int64) * mask_key, mask=readable, other=1) == 0
        y = tl.where(seen, tl.exp2((score - row_shift) * _LOG2E) * inverse, 0.0)
        tl.store(y_ptr + columns, y.to(y_ptr.dtype.element_ty), mask=columns < num_keys)


@triton.jit
def _long_backward_kernel(
    dy_ptr,  # [num_rows, num_keys], in
    y_ptr,  # [num_rows, num_keys], in
    dx_ptr,  # [num_rows, num_keys], out
    num_queries,
    key_units,  # num_keys / ALIGN
    scale,
    window,  # number of keys that a query sees, with WINDOW
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One program: one row, read twice."""
    num_keys = key_units * ALIGN
    row = tl.program_id(0).to(tl.int64)
    query = (row % num_queries).to(tl.int32)
    begin, end = _seen(query, num_queries, num_keys, window, CAUSAL, WINDOW)
    readable_begin = begin // ALIGN * ALIGN
    readable_end = (end + (ALIGN - 1)) // ALIGN * ALIGN
    dy_ptr += row * num_keys
    y_ptr += row * num_keys
    dx_ptr += row * num_keys
    tile = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    dots = tl.zeros([LANES], tl.float32)
    for start in range(begin // (LANES * VECTOR) * (LANES * VECTOR), end, LANES * VECTOR):
        columns = start + tile
        readable = (columns >= readable_begin) & (columns < readable_end)
        y = tl.load(y_ptr + columns, mask=readable, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + columns, mask=readable, other=0.0).to(tl.float32)
        dots += tl.sum(tl.where((columns >= begin) & (columns < end), y * dy, 0.0), 1)
    dot = tl.sum(dots, 0)
    for start in range(0, num_keys, LANES * VECTOR):
        columns = start + tile
        readable = (columns >= readable_begin) & (columns < readable_end)
        y = tl.load(y_ptr + columns, mask=readable, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + columns, mask=readable, other=0.0).to(tl.float32)
        dx = tl.where((columns >= begin) & (columns < end), scale * (y * (dy - dot)), 0.0)
        tl.store(dx_ptr + columns, dx.to(dx_ptr.dtype.element_ty), mask=columns < num_keys)


def scaled_masked_softmax_forward(
    x: torch.Tensor, mask: torch.Tensor | None, scale: float, causal: bool, window: int
) -> torch.Tensor:
    """Return the softmax over the keys that each query sees, in the dtype of x, contiguous."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() > 0:
        with _on(x):
            _forward(x, mask, y, float(scale), causal, min(window, x.shape[-1]))
    return y


def _forward(
    x: torch.Tensor, mask: torch.Tensor | None, y: torch.Tensor, scale: float, causal: bool, window: int
) -> None:
    num_keys = x.shape[-1]
    leading: list[tuple[int, int]] = []
    query_stride = key_stride = 0
    if mask is not None:
        # The expanded mask is a view with strides of 0, not a copy.
        mask = mask.expand(x.shape).view(torch.uint8)
        leading = _merged(mask)
        query_stride = mask.stride(-2) if mask.dim() > 1 and mask.shape[-2] > 1 else 0
        key_stride = mask.stride(-1)
    if mask is not None and len(leading) > 2:
        for x_part, mask_part, y_part in zip(x, mask.view(torch.bool), y, strict=True):
            _forward(x_part, mask_part, y_part, scale, causal, window)
        return
    (_, outer_stride), (heads, inner_stride) = [(1, 0), (1, 0), *leading][-2:]
    strides = (outer_stride, inner_stride, query_stride)
    # Wide loads of the mask need dense keys, and rows that begin at multiples of the width.
    mask_align = math.gcd(16, *strides) if key_stride == 1 else 1
    arguments = (scale, window, heads, *(stride // mask_align for stride in strides), key_stride)
    form: dict[str, Any] = {"CAUSAL": causal, "WINDOW": window > 0, "HAS_MASK": mask is not None}
    form |= {"ALIGN": _alignment(x), "MASK_ALIGN": mask_align}
    num_rows = x.numel() // num_keys
    num_queries = x.shape[-2] if x.dim() > 1 else 1
    pointers = (x, x if mask is None else mask, y)
    if num_keys > _longest_row(x.device):
        _long_forward_kernel[(num_rows,)](
            *pointers, num_queries, num_keys // form["ALIGN"], *arguments, **form, **_long_options(x)
        )
        return
    shared = mask is not None and heads > 1 and inner_stride == 0
    block = triton.next_power_of_2(num_keys)
    rows = max(1, _ELEMENTS // block)
    if shared:
        rows = math.gcd(heads, max(1, _ROW_LIMIT // block))
    _forward_kernel[(triton.cdiv(num_rows, rows),)](
        *pointers, num_rows, num_queries, num_keys // form["ALIGN"], *arguments,
        **form, SHARED=shared, ROWS=rows, BLOCK=block, **_options(rows * block),
    )  # fmt: skip


def scaled_masked_softmax_backward(
    dy: torch.Tensor, y: torch.Tensor, scale: float, causal: bool, window: int
) -> torch.Tensor:
    """Return the gradient of x, in the dtype of y, contiguous."""
    dy = dy.contiguous()
    y = y.contiguous()
    dx = torch.empty_like(y)
    if y.numel() == 0:
        return dx
    num_keys = y.shape[-1]
    num_queries = y.shape[-2] if y.dim() > 1 else 1
    num_rows = y.numel() // num_keys
    form = {"CAUSAL": causal, "WINDOW": window > 0, "ALIGN": _alignment(y)}
    arguments = (num_queries, num_keys // form["ALIGN"], float(scale), min(window, num_keys))
    with _on(y):
        if num_keys > _longest_row(y.device):
            _long_backward_kernel[(num_rows,)](dy, y, dx, *arguments, **form, **_long_options(y))
        else:
            block = triton.next_power_of_2(num_keys)
            rows = max(1, _ELEMENTS // block)
            _backward_kernel[(triton.cdiv(num_rows, rows),)](
                dy, y, dx, num_rows, *arguments, **form, ROWS=rows, BLOCK=block, **_options(rows * block)
            )
    return dx


def _merged(mask: torch.Tensor) -> list[tuple[int, int]]:
    """Return (size, stride) of the dims before the last two; neighbours that one stride describes are merged."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(mask.shape[:-2], mask.stride()[:-2], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def _vector(x: torch.Tensor) -> int:
    """Return the number of keys in 16 bytes."""
    return 16 // x.element_size()


def _alignment(x: torch.Tensor) -> int:
    return math.gcd(x.shape[-1], _vector(x))


def _options(elements: int) -> dict[str, Any]:
    """Return the launch options of a program with this number of elements."""
    num_ctas = max(1, elements // _ROW_LIMIT)
    num_warps = max(1, elements // num_ctas // (32 * _ELEMENTS_PER_THREAD))
    # Triton 3.10 uses fused multiply-adds only with this option.
    options = {"num_warps": min(16, num_warps), "enable_fp_fusion": True}
    # Only GPUs with clusters accept num_ctas above 1.
    return options | {"num_ctas": num_ctas} if num_ctas > 1 else options


def _long_options(x: torch.Tensor) -> dict[str, Any]:
    return {"LANES": _LANES, "VECTOR": _vector(x), "num_warps": 8, "enable_fp_fusion": True}


@functools.cache
def _longest_row(device: torch.device) -> int:
    """Return the keys of the longest row that fits in registers."""
    clusters = _CLUSTERS and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return _ROW_LIMIT * (_CLUSTER_LIMIT if clusters else 1)


def _on(x: torch.Tensor) -> Any:
    """Make the device of x the current device, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

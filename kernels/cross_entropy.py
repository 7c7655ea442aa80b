"""Triton kernels for the cross-entropy of vocabulary shards. The math is in fused_megatron/reference/cross_entropy.py.

Forward reads each logit once; backward reads each logit once and writes its gradient once. A tile is [LANES, VECTOR]:
one thread handles VECTOR neighbouring columns (16 bytes), so that loads and stores have 128 bits. Each lane keeps its
own running maximum and sum: that costs one exp2 per VECTOR logits instead of a reduction over the block per tile.

A vocabulary size is rarely a multiple of the tile. So tiles begin at 16-byte boundaries; a row begins at column `shift`
of its first tile. Only the tiles at the two ends of a row are masked, which makes their accesses narrower. Tensors that
do not begin at a 16-byte boundary give correct results, more slowly.

These kernels use no thread block clusters. A cluster could keep a row on chip from its statistics to its gradient and
save the second read of the logits (4 instead of 6 bytes per 16-bit logit). But forward does not know the upstream
gradient: scaling the gradient later rounds it twice and moves 4 bytes more, and shards of a vocabulary must exchange
their statistics in between. (linear_cross_entropy computes the gradient in forward, since it does not keep its logits.)
"""

# mypy: allow-untyped-defs
# (The arguments of a Triton kernel have no Python types.)

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LANES = 256  # with 4 warps: two 16-byte loads in flight per thread, and registers for 5 programs per multiprocessor
# Triton 3.10 uses fused multiply-adds only with this option.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
_MERGE_BLOCK = 128
# Rows are split until there are this many programs per multiprocessor: fewer do not use the full memory bandwidth.
_PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit
def _finite_or_zero(maximum):
    # -inf minus -inf would be NaN: values that are all -inf are shifted by 0, and their exponentials are 0.
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def _capped(x, softcap):
    """Return softcap tanh(x / softcap) and its derivative, from exp(-2 |x| / softcap): no overflow or cancellation."""
    e = tl.exp2(tl.abs(x) * (-2.0 * _LOG2E / softcap))
    reciprocal = 1.0 / (1.0 + e)
    size = softcap * ((1.0 - e) * reciprocal)
    return tl.where(x < 0.0, -size, size), 4.0 * e * (reciprocal * reciprocal)


@triton.jit
def _aligned(row, row_stride, SHIFTED: tl.constexpr, VECTOR: tl.constexpr):
    """Return the offset of the last 16-byte boundary at or before the row's begin, and the elements between them."""
    begin = row * row_stride
    # This form shows the compiler a multiple of VECTOR.
    boundary = begin // VECTOR * VECTOR
    if SHIFTED:
        shift = (begin - boundary).to(tl.int32)
    else:
        shift = 0
    return boundary, shift


@triton.jit
def _edge_tile(row_ptr, positions, shift, end):
    """Load a tile at an end of a row, with -inf in columns outside of the row; return it and what is inside."""
    inside = (positions >= shift) & (positions < end)
    return tl.load(row_ptr + positions, mask=inside, other=-float("inf")).to(tl.float32), inside


@triton.jit
def _with_tile(x, inside, softcap, maximum, exp_sum, plain_sum, count, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return the four running numbers of each lane with the columns of a tile, x, added."""
    if SOFTCAP:
        x = tl.where(inside, _capped(x, softcap)[0], -float("inf"))
    larger = tl.maximum(maximum, tl.max(x, 1))
    base = _finite_or_zero(larger)
    exp_sum *= tl.exp2((maximum - base) * _LOG2E)
    x -= base[:, None]
    exp_sum += tl.sum(tl.exp2(x * _LOG2E), 1)
    if SMOOTHING:
        plain_sum += count * (_finite_or_zero(maximum) - base) + tl.sum(tl.where(inside, x, 0.0), 1)
        count += tl.sum(inside.to(tl.float32), 1)
    return larger, exp_sum, plain_sum, count


@triton.jit
def _statistics_kernel(
    logits_ptr,  # [T, V / R] in rows of row_stride, in
    target_ptr,  # int64 [T], in
    stats_ptr,  # float32 [num_splits, T, 3], with SPLIT [num_splits, T, 4], out
    num_rows,  # T
    row_stride,
    num_real,  # columns without padding
    vocab_start,
    vocab_size,
    ignore_index,
    label_smoothing,
    softcap,
    tiles_per_split,
    num_splits,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    SHIFTED: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One program: (shift, log_sum, linear) of one split of one row.

    SPLIT adds a fourth number, share: by how much linear falls if all logits of the row grow by 1.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // num_splits
    split = (program % num_splits).to(tl.int32)
    stats_ptr += (split.to(tl.int64) * num_rows + row) * (4 if SPLIT else 3)
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(stats_ptr, 0.0)
        tl.store(stats_ptr + 1, 0.0)
        tl.store(stats_ptr + 2, 0.0)
        if SPLIT:
            tl.store(stats_ptr + 3, 0.0)
        return
    boundary, shift = _aligned(row, row_stride, SHIFTED, VECTOR)
    end = shift + num_real
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    maximum = tl.full([LANES], -float("inf"), tl.float32)
    exp_sum = tl.zeros([LANES], tl.float32)
    plain_sum = tl.zeros([LANES], tl.float32)  # of x - maximum: a large common offset would cost precision
    count = tl.zeros([LANES], tl.float32)
    first = split * tiles_per_split
    stop = tl.minimum(first + tiles_per_split, tl.cdiv(end, LANES * VECTOR))
    # Tiles first_full to last_full - 1 have all their columns in the row: at most one tile before and one after them.
    first_full = first
    if (first * (LANES * VECTOR) < shift) & (first < stop):
        first_full = first + 1
        x, inside = _edge_tile(logits_ptr + boundary, first * (LANES * VECTOR) + lanes, shift, end)
        maximum, exp_sum, plain_sum, count = _with_tile(
            x, inside, softcap, maximum, exp_sum, plain_sum, count, SMOOTHING, SOFTCAP
        )
    last_full = tl.maximum(tl.minimum(stop, end // (LANES * VECTOR)), first_full)
    # The next tile is on its way while the exponentials of this one are computed. It waits in registers: through shared
    # memory it would take more instructions.
    everywhere = tl.full([LANES, VECTOR], 1, tl.int1)
    nowhere = tl.full([LANES, VECTOR], 0, tl.int1)
    pointers = logits_ptr + boundary + (first_full * (LANES * VECTOR) + lanes)
    following = tl.load(pointers, mask=tl.where(first_full < last_full, everywhere, nowhere))
    for i in range(first_full, last_full):
        x = following.to(tl.float32)
        pointers += LANES * VECTOR
        following = tl.load(pointers, mask=tl.where(i + 1 < last_full, everywhere, nowhere))
        maximum, exp_sum, plain_sum, count = _with_tile(
            x, everywhere, softcap, maximum, exp_sum, plain_sum, count, SMOOTHING, SOFTCAP
        )
    if last_full < stop:
        x, inside = _edge_tile(logits_ptr + boundary, last_full * (LANES * VECTOR) + lanes, shift, end)
        maximum, exp_sum, plain_sum, count = _with_tile(
            x, inside, softcap, maximum, exp_sum, plain_sum, count, SMOOTHING, SOFTCAP
        )
    row_shift = _finite_or_zero(tl.max(maximum, 0))
    row_exp_sum = tl.sum(exp_sum * tl.exp2((maximum - row_shift) * _LOG2E), 0)
    tl.store(stats_ptr, row_shift)
    tl.store(stats_ptr + 1, tl.log(row_exp_sum))
    linear = 0.0
    share = 0.0
    if SMOOTHING:
        per_entry = label_smoothing / vocab_size
        linear -= per_entry * tl.sum(plain_sum + count * (_finite_or_zero(maximum) - row_shift), 0)
        share += per_entry * tl.sum(count, 0)
    if split == 0:
        column = target - vocab_start
        if (column >= 0) & (column < num_real):
            x_target = tl.load(logits_ptr + row * row_stride + column).to(tl.float32)
            if SOFTCAP:
                x_target = _capped(x_target, softcap)[0]
            linear -= (1.0 - label_smoothing) * (x_target - row_shift)
            share += 1.0 - label_smoothing
        if (target < 0) | (target >= vocab_size):
            linear = float("nan")
    tl.store(stats_ptr + 2, linear)
    if SPLIT:
        tl.store(stats_ptr + 3, share)


@triton.jit
def _merge_kernel(
    stats_ptr,  # float32 [num_shards, T, 3], with SPLITS [num_splits, T, 4], in
    target_ptr,  # int64 [T], in
    loss_ptr,  # float32 [T], out; unused with SPLITS
    out_ptr,  # float32 [T, 2], lse as (shift, log_sum), out; with SPLITS [T, 3], the merged statistics
    num_rows,  # T
    num_shards,  # or num_splits
    num_columns,  # of a shard, with padding
    vocab_size,
    ignore_index,
    label_smoothing,
    z_loss,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program, BLOCK rows: merge shards to loss and lse; with SPLITS, merge the splits of each row."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    target = tl.load(target_ptr + rows, mask=inside, other=0)
    ignored = target == ignore_index
    NUMBERS: tl.constexpr = 4 if SPLITS else 3
    # Everything is relative to the shard with the largest sum: merging a single shard changes no bit.
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    top_shift = tl.zeros([BLOCK], tl.float32)
    top_log_sum = tl.zeros([BLOCK], tl.float32)
    stats = stats_ptr + rows * NUMBERS
    for _ in range(num_shards):
        shift = tl.load(stats, mask=inside, other=0.0)
        log_sum = tl.load(stats + 1, mask=inside, other=0.0)
        larger = shift + log_sum > largest
        largest = tl.where(larger, shift + log_sum, largest)
        top_shift = tl.where(larger, shift, top_shift)
        top_log_sum = tl.where(larger, log_sum, top_log_sum)
        stats += num_rows * NUMBERS
    exp_sum = tl.zeros([BLOCK], tl.float32)
    linear = tl.zeros([BLOCK], tl.float32)
    stats = stats_ptr + rows * NUMBERS
    start = tl.zeros([BLOCK], tl.int64)
    for _ in range(num_shards):
        shift = tl.load(stats, mask=inside, other=0.0)
        log_sum = tl.load(stats + 1, mask=inside, other=0.0)
        exp_sum += tl.exp2(((shift - top_shift) + (log_sum - top_log_sum)) * _LOG2E)
        if SPLITS:
            share = tl.load(stats + 3, mask=inside, other=0.0)
        else:
            end = tl.minimum(start + num_columns, vocab_size)
            num_real = tl.maximum(end - start, 0).to(tl.float32)
            share = tl.where((target >= start) & (target < end), 1.0 - label_smoothing, 0.0)
            share += label_smoothing / vocab_size * num_real
        linear += tl.load(stats + 2, mask=inside, other=0.0) + share * (top_shift - shift)
        stats += num_rows * NUMBERS
        start += num_columns
    log_sum = top_log_sum + tl.log(exp_sum)
    if SPLITS:
        out = out_ptr + rows * 3
        tl.store(out, tl.where(ignored, 0.0, top_shift), mask=inside)
        tl.store(out + 1, tl.where(ignored, 0.0, log_sum), mask=inside)
        tl.store(out + 2, tl.where(ignored, 0.0, linear), mask=inside)
    else:
        lse = top_shift + log_sum
        # lse may be -inf, and 0 * inf is NaN.
        loss = log_sum + linear + tl.where(z_loss == 0.0, 0.0, z_loss * lse * lse)
        tl.store(loss_ptr + rows, tl.where(ignored, 0.0, loss), mask=inside)
        tl.store(out_ptr + rows * 2, top_shift, mask=inside)
        tl.store(out_ptr + rows * 2 + 1, log_sum, mask=inside)


@triton.jit
def _gradient_kernel(
    grad_loss_ptr,  # float32 [T], in
    logits_ptr,  # [T, V / R] in rows of row_stride, in
    target_ptr,  # int64 [T], in
    lse_ptr,  # float32 [T, 2], (shift, log_sum), in
    dlogits_ptr,  # [T, V / R] in rows of dlogits_stride, out; may be the logits
    row_stride,
    dlogits_stride,
    num_columns,
    num_real,  # columns without padding
    vocab_start,
    vocab_size,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    tiles_per_row,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SHIFTED: tl.constexpr,
    SAME_SHIFT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One program: one tile of one row of dlogits."""
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles_per_row
    start = (program % tiles_per_row).to(tl.int32) * (LANES * VECTOR)
    # Counted from the boundary, `shift` elements before column 0.
    positions = start + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    boundary, shift = _aligned(row, row_stride, SHIFTED, VECTOR)
    end = shift + num_columns
    full = (start >= shift) & (start + LANES * VECTOR <= end)
    inside = (positions >= shift) & (positions < end)
    pointers = logits_ptr + boundary + positions
    if SAME_SHIFT:
        out_pointers = dlogits_ptr + _aligned(row, dlogits_stride, SHIFTED, VECTOR)[0] + positions
    else:
        out_pointers = dlogits_ptr + (row * dlogits_stride - shift) + positions
    target = tl.load(target_ptr + row)
    gradient = tl.zeros([LANES, VECTOR], tl.float32)
    if target != ignore_index:
        grad_loss = tl.load(grad_loss_ptr + row)
        if (target < 0) | (target >= vocab_size):
            grad_loss = float("nan")
        lse_shift = tl.load(lse_ptr + row * 2)
        log_sum = tl.load(lse_ptr + row * 2 + 1)
        if full:
            x = tl.load(pointers).to(tl.float32)
        else:
            x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        if SOFTCAP:
            x, slope = _capped(x, softcap)
        # exp(x - shift - log_sum) as a product: log_sum is at most about log(vocab_size), so exp(-log_sum) is in range.
        scale = tl.exp2(-log_sum * _LOG2E) * (1.0 + 2.0 * z_loss * (lse_shift + log_sum))
        gradient = tl.exp2((x - lse_shift) * _LOG2E) * scale
        if SMOOTHING:
            gradient -= label_smoothing / vocab_size
        column = target - vocab_start
        # In 32 bits, since every element is compared with it; -1 equals no position.
        target_position = tl.where((column >= 0) & (column < num_columns), column + shift, -1).to(tl.int32)
        gradient -= tl.where(positions == target_position, 1.0 - label_smoothing, 0.0)
        if SOFTCAP:
            gradient *= slope
        gradient = tl.where(positions < shift + num_real, gradient * grad_loss, 0.0)
    rounded = gradient.to(dlogits_ptr.dtype.element_ty)
    if full:
        tl.store(out_pointers, rounded)
    else:
        tl.store(out_pointers, rounded, mask=inside)


def cross_entropy_statistics(
    logits: torch.Tensor,
    target: torch.Tensor,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> torch.Tensor:
    """Return [T, 3] float32: (shift, log_sum, linear) of each row of this shard."""
    num_rows, num_columns = logits.shape
    num_real = max(0, min(num_columns, vocab_size - vocab_start))
    stats = logits.new_empty((num_rows, 3), dtype=torch.float32)
    if num_rows == 0:
        return stats
    tiles_per_row = _tiles_per_row(logits, num_real)
    num_splits = _num_splits(num_rows, tiles_per_row, _num_multiprocessors(logits.device))
    parts = stats if num_splits == 1 else logits.new_empty((num_splits, num_rows, 4), dtype=torch.float32)
    with _on(logits):
        _statistics_kernel[(num_rows * num_splits,)](
            logits, target, parts, num_rows, logits.stride(0), num_real, vocab_start, vocab_size, ignore_index,
            label_smoothing, softcap, triton.cdiv(tiles_per_row, num_splits), num_splits,
            SMOOTHING=label_smoothing != 0.0, SOFTCAP=softcap != 0.0, SPLIT=num_splits > 1, SHIFTED=_shifted(logits),
            LANES=_LANES, VECTOR=_vector(logits),
            maxnreg=_registers(label_smoothing != 0.0, softcap != 0.0), **_OPTIONS,
        )  # fmt: skip
        if num_splits > 1:
            _launch_merge(parts, target, None, stats, num_columns, vocab_size, ignore_index, label_smoothing, 0.0)
    return stats


def cross_entropy_merge(
    stats: torch.Tensor,
    target: torch.Tensor,
    num_columns: int,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss [T] and lse [T, 2] from the statistics [R, T, 3] of shards with num_columns columns each."""
    loss = stats.new_empty(stats.shape[1])
    lse = stats.new_empty((stats.shape[1], 2))
    if stats.shape[1] > 0:
        with _on(stats):
            _launch_merge(stats, target, loss, lse, num_columns, vocab_size, ignore_index, label_smoothing, z_loss)
    return loss, lse


def cross_entropy_gradient(grad_loss: torch.Tensor, logits: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Return the gradient of this shard's logits, in their dtype, contiguous."""
    dlogits = logits.new_empty(logits.shape)
    _launch_gradient(dlogits, grad_loss, logits, *arguments)
    return dlogits


def cross_entropy_gradient_(grad_loss: torch.Tensor, logits: torch.Tensor, *arguments: Any) -> None:
    """Overwrite the logits with their gradient."""
    _launch_gradient(logits, grad_loss, logits, *arguments)


def _launch_gradient(
    dlogits: torch.Tensor,
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    num_rows, num_columns = logits.shape
    num_real = max(0, min(num_columns, vocab_size - vocab_start))
    if logits.numel() == 0:
        return
    tiles_per_row = _tiles_per_row(logits, num_columns)
    with _on(logits):
        _gradient_kernel[(num_rows * tiles_per_row,)](
            grad_loss, logits, target, lse, dlogits, logits.stride(0), dlogits.stride(0), num_columns, num_real,
            vocab_start, vocab_size, ignore_index, label_smoothing, z_loss, softcap, tiles_per_row,
            SMOOTHING=label_smoothing != 0.0, SOFTCAP=softcap != 0.0, SHIFTED=_shifted(logits),
            SAME_SHIFT=num_rows == 1 or (logits.stride(0) - dlogits.stride(0)) % _vector(logits) == 0,
            LANES=_LANES, VECTOR=_vector(logits), **_OPTIONS,
        )  # fmt: skip


def _launch_merge(
    stats: torch.Tensor,
    target: torch.Tensor,
    loss: torch.Tensor | None,
    out: torch.Tensor,
    num_columns: int,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    """Merge shards to loss and lse (out); if loss is None, merge the splits of one shard to its statistics (out)."""
    num_shards, num_rows = stats.shape[:2]
    _merge_kernel[(triton.cdiv(num_rows, _MERGE_BLOCK),)](
        stats, target, loss, out, num_rows, num_shards, num_columns, vocab_size, ignore_index, label_smoothing, z_loss,
        SPLITS=loss is None, BLOCK=_MERGE_BLOCK, **_OPTIONS,
    )  # fmt: skip


def _vector(x: torch.Tensor) -> int:
    """Return the number of columns in 16 bytes."""
    return 16 // x.element_size()


def _shifted(logits: torch.Tensor) -> bool:
    """Return whether some rows do not begin at a 16-byte boundary."""
    return logits.shape[0] > 1 and logits.stride(0) % _vector(logits) != 0


def _tiles_per_row(logits: torch.Tensor, num_columns: int) -> int:
    """Return the number of tiles for num_columns columns, for any position of a row's begin in the first tile."""
    vector = _vector(logits)
    return triton.cdiv(num_columns + (vector - 1 if _shifted(logits) else 0), _LANES * vector)


def _num_splits(num_rows: int, num_tiles: int, num_multiprocessors: int) -> int:
    """Return the programs per row, so that even a few long rows keep the whole device busy; each has a tile."""
    wanted = -(-_PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors // num_rows)
    tiles_per_split = triton.cdiv(num_tiles, max(1, min(wanted, num_tiles)))
    return max(1, triton.cdiv(num_tiles, max(1, tiles_per_split)))


def _registers(smoothing: bool, softcap: bool) -> int | None:
    """Return the registers of a thread of _statistics_kernel; None: as many as ptxas wants.

    Asked for nothing, ptxas reuses the registers of one tile for the next: it loads the next after the exponentials.
    With 48 registers 10 programs fit on a multiprocessor, with 72 seven: 40 and 28 KiB are in flight. With a softcap
    arithmetic is the limit.
    """
    if softcap:
        return None
    return 72 if smoothing else 48


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    # CPU tensors, which get here only in the interpreter, count as 1.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _on(x: torch.Tensor) -> Any:
    """Make the device of x the current device, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

"""Triton kernels for the cross-entropy of vocabulary shards. The math is in fused_megatron/reference/cross_entropy.py.

Each logit is read once forward; read once, and its gradient written once, backward. Tiles are [LANES, VECTOR]: VECTOR
neighbouring columns (16 bytes) belong to one thread, so that loads and stores take 128 bits, and a lane keeps its own
running maximum and sum: one extra exp2 per VECTOR logits instead of a reduction over the block per tile.

Whole rows are loaded and stored, padded columns included (masked by value): a mask that ends at the true vocabulary,
which is rarely a multiple of anything, would break the wide accesses.
"""

# mypy: allow-untyped-defs
# (What a Triton kernel takes has no Python type.)

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LANES = 256  # with 4 warps: two 16-byte loads in flight per thread, in few enough registers for 5 programs a processor
# Triton 3.10 leaves fused multiply-adds off unless told.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
_MERGE_BLOCK = 128
# Rows are split over several programs until there are this many per multiprocessor: fewer leave memory idle.
_PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit
def _finite_or_zero(maximum):
    # -inf minus -inf would be NaN: what holds -inf alone is shifted by 0, and its exponentials are 0.
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def _statistics_kernel(
    logits_ptr, target_ptr, stats_ptr, num_rows, row_stride, num_columns, num_real, vocab_start, vocab_size,
    ignore_index, label_smoothing, columns_per_split, num_splits,
    SMOOTHING: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program: (lse, linear) of one split of one row; stats [num_splits, num_rows, 2]."""
    program = tl.program_id(0).to(tl.int64)
    row = program // num_splits
    split = (program % num_splits).to(tl.int32)
    stats_ptr += (split.to(tl.int64) * num_rows + row) * 2
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(stats_ptr, 0.0)
        tl.store(stats_ptr + 1, 0.0)
        return
    logits_ptr += row * row_stride
    tile = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    maximum = tl.full([LANES], -float("inf"), tl.float32)
    exp_sum = tl.zeros([LANES], tl.float32)
    plain_sum = tl.zeros([LANES], tl.float32)
    begin = split * columns_per_split
    for start in range(begin, tl.minimum(begin + columns_per_split, num_real), LANES * VECTOR):
        columns = start + tile
        x = tl.load(logits_ptr + columns, mask=columns < num_columns, other=-float("inf")).to(tl.float32)
        x = tl.where(columns < num_real, x, -float("inf"))
        larger = tl.maximum(maximum, tl.max(x, 1))
        shift = _finite_or_zero(larger)
        exp_sum *= tl.exp2((maximum - shift) * _LOG2E)
        exp_sum += tl.sum(tl.exp2((x - shift[:, None]) * _LOG2E), 1)
        maximum = larger
        if SMOOTHING:
            plain_sum += tl.sum(tl.where(columns < num_real, x, 0.0), 1)
    row_shift = _finite_or_zero(tl.max(maximum, 0))
    row_exp_sum = tl.sum(exp_sum * tl.exp2((maximum - row_shift) * _LOG2E), 0)
    tl.store(stats_ptr, row_shift + tl.log(row_exp_sum))
    linear = 0.0
    if SMOOTHING:
        linear -= label_smoothing / vocab_size * tl.sum(plain_sum, 0)
    if split == 0:
        column = target - vocab_start
        if (column >= 0) & (column < num_real):
            linear -= (1.0 - label_smoothing) * tl.load(logits_ptr + column).to(tl.float32)
        if (target < 0) | (target >= vocab_size):
            linear = float("nan")
    tl.store(stats_ptr + 1, linear)


@triton.jit
def _merge_kernel(
    stats_ptr, target_ptr, first_ptr, second_ptr, num_rows, num_shards, out_stride, ignore_index, z_loss,
    LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """stats [num_shards, num_rows, 2] to (loss, lse); without LOSS to (lse, linear): the statistics of their union."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    ignored = tl.load(target_ptr + rows, mask=inside, other=0) == ignore_index
    maximum = tl.full([BLOCK], -float("inf"), tl.float32)
    stats = stats_ptr + rows * 2
    for _ in range(num_shards):
        maximum = tl.maximum(maximum, tl.load(stats, mask=inside, other=0.0))
        stats += num_rows * 2
    shift = _finite_or_zero(maximum)
    exp_sum = tl.zeros([BLOCK], tl.float32)
    linear = tl.zeros([BLOCK], tl.float32)
    stats = stats_ptr + rows * 2
    for _ in range(num_shards):
        exp_sum += tl.exp2((tl.load(stats, mask=inside, other=0.0) - shift) * _LOG2E)
        linear += tl.load(stats + 1, mask=inside, other=0.0)
        stats += num_rows * 2
    lse = shift + tl.log(exp_sum)
    if LOSS:
        loss = lse + linear + tl.where(z_loss == 0.0, 0.0, z_loss * lse * lse)  # lse may be -inf, and 0 times inf NaN
        tl.store(first_ptr + rows * out_stride, tl.where(ignored, 0.0, loss), mask=inside)
        tl.store(second_ptr + rows * out_stride, lse, mask=inside)
    else:
        tl.store(first_ptr + rows * out_stride, tl.where(ignored, 0.0, lse), mask=inside)
        tl.store(second_ptr + rows * out_stride, tl.where(ignored, 0.0, linear), mask=inside)


@triton.jit
def _gradient_kernel(
    grad_loss_ptr, logits_ptr, target_ptr, lse_ptr, dlogits_ptr, row_stride, num_columns, num_real, vocab_start,
    vocab_size, ignore_index, label_smoothing, z_loss, tiles_per_row,
    SMOOTHING: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program: one tile of one row of dlogits, which is dense."""
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles_per_row
    columns = (program % tiles_per_row).to(tl.int32) * (LANES * VECTOR)
    columns += tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    inside = columns < num_columns
    dlogits_ptr += row * num_columns
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        zeros = tl.zeros([LANES, VECTOR], tl.float32)
        tl.store(dlogits_ptr + columns, zeros.to(dlogits_ptr.dtype.element_ty), mask=inside)
        return
    grad_loss = tl.load(grad_loss_ptr + row)
    if (target < 0) | (target >= vocab_size):
        grad_loss = float("nan")
    lse = tl.load(lse_ptr + row)
    x = tl.load(logits_ptr + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.exp2((x - lse) * _LOG2E) * (1.0 + 2.0 * z_loss * lse)
    if SMOOTHING:
        gradient -= label_smoothing / vocab_size
    gradient -= tl.where(columns == target - vocab_start, 1.0 - label_smoothing, 0.0)
    gradient = tl.where(columns < num_real, gradient * grad_loss, 0.0)
    tl.store(dlogits_ptr + columns, gradient.to(dlogits_ptr.dtype.element_ty), mask=inside)


def cross_entropy_statistics(
    logits: torch.Tensor,
    target: torch.Tensor,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    """[T, 2] float32: (lse, linear) of each row of this shard."""
    num_rows, num_columns = logits.shape
    num_real = max(0, min(num_columns, vocab_size - vocab_start))
    stats = logits.new_empty((num_rows, 2), dtype=torch.float32)
    if num_rows == 0:
        return stats
    tile = _LANES * _vector(logits)
    num_splits = _num_splits(num_rows, triton.cdiv(num_real, tile), _num_multiprocessors(logits.device))
    columns_per_split = triton.cdiv(triton.cdiv(num_real, tile), num_splits) * tile
    parts = stats if num_splits == 1 else logits.new_empty((num_splits, num_rows, 2), dtype=torch.float32)
    with _on(logits):
        _statistics_kernel[(num_rows * num_splits,)](
            logits, target, parts, num_rows, logits.stride(0), num_columns, num_real, vocab_start, vocab_size,
            ignore_index, label_smoothing, columns_per_split, num_splits,
            SMOOTHING=label_smoothing != 0.0, LANES=_LANES, VECTOR=_vector(logits), **_OPTIONS,
        )  # fmt: skip
        if num_splits > 1:
            _launch_merge(parts, target, stats, stats[:, 1], 2, ignore_index, 0.0, False)
    return stats


def cross_entropy_merge(
    stats: torch.Tensor, target: torch.Tensor, ignore_index: int, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [T], lse [T]) from stats [R, T, 2]."""
    loss = stats.new_empty(stats.shape[1])
    lse = stats.new_empty(stats.shape[1])
    if stats.shape[1] > 0:
        with _on(stats):
            _launch_merge(stats, target, loss, lse, 1, ignore_index, z_loss, True)
    return loss, lse


def cross_entropy_gradient(
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> torch.Tensor:
    """The gradient of this shard's logits, in their dtype, dense."""
    num_rows, num_columns = logits.shape
    num_real = max(0, min(num_columns, vocab_size - vocab_start))
    dlogits = logits.new_empty((num_rows, num_columns))
    if dlogits.numel() == 0:
        return dlogits
    tiles_per_row = triton.cdiv(num_columns, _LANES * _vector(logits))
    with _on(logits):
        _gradient_kernel[(num_rows * tiles_per_row,)](
            grad_loss, logits, target, lse, dlogits, logits.stride(0), num_columns, num_real, vocab_start,
            vocab_size, ignore_index, label_smoothing, z_loss, tiles_per_row,
            SMOOTHING=label_smoothing != 0.0, LANES=_LANES, VECTOR=_vector(logits), **_OPTIONS,
        )  # fmt: skip
    return dlogits


def _launch_merge(
    stats: torch.Tensor,
    target: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    out_stride: int,
    ignore_index: int,
    z_loss: float,
    loss: bool,
) -> None:
    num_shards, num_rows = stats.shape[:2]
    _merge_kernel[(triton.cdiv(num_rows, _MERGE_BLOCK),)](
        stats, target, first, second, num_rows, num_shards, out_stride, ignore_index, z_loss,
        LOSS=loss, BLOCK=_MERGE_BLOCK, **_OPTIONS,
    )  # fmt: skip


def _vector(x: torch.Tensor) -> int:
    """Columns in 16 bytes."""
    return 16 // x.element_size()


def _num_splits(num_rows: int, num_tiles: int, num_multiprocessors: int) -> int:
    """Programs per row, so that a few long rows still keep the whole device busy."""
    wanted = -(-_PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors // num_rows)
    return max(1, min(wanted, num_tiles))


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    # 1 for CPU tensors, which come here in the interpreter alone.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _on(x: torch.Tensor) -> Any:
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

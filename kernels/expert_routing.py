"""Triton kernels of expert_routing. The math is in fused_megatron/reference/expert_routing.py.

A program keeps rows of logits whole in registers. Each row of the grid has the tokens of one sequence, whose counts and
sums it adds up in registers; a last kernel adds the parts of a sequence in order. Only the shape decides the parts.
"""

# mypy: allow-untyped-defs
# (The arguments of a Triton kernel have no Python types.)

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

_TINY = tl.constexpr(1e-20)  # TINY of the reference
_ELEMENTS = 2048  # logits of a tile
_PART_TOKENS = 64  # least number of tokens of a part
_MOST_PARTS = 512


@triton.jit
def _keys(value, columns, num_columns):
    """Return a key for each value: larger for a larger value, and for a lower column of equal values.

    NaN counts as -inf, and -0 as 0. Keys beyond the last column are below all others.
    """
    value = tl.where(value == value, value, -float("inf")) + 0.0
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (num_columns - 1 - columns)
    return tl.where(columns < num_columns, key, -0x7FFFFFFFFFFFFFFF)


@triton.jit
def _value_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _without_other_groups(
    keys, biased, columns, num_experts, GROUPS: tl.constexpr, GROUPS_PER_TOKEN: tl.constexpr, GROUP_BLOCK: tl.constexpr
):
    """Exclude the keys outside the best groups: those with the largest sum of their two best biased scores."""
    size = num_experts // GROUPS
    of_scores = _keys(biased, columns, num_experts)
    group_columns = tl.arange(0, GROUP_BLOCK)[None, :]
    sums = tl.zeros([keys.shape[0], GROUP_BLOCK], tl.float32)
    for group in tl.static_range(GROUPS):
        inside = tl.where(columns // size == group, of_scores, -0x7FFFFFFFFFFFFFFF)
        best = tl.max(inside, 1)
        second = tl.max(tl.where(inside < best[:, None], inside, -0x7FFFFFFFFFFFFFFF), 1)
        total = _value_of(best)
        total = tl.where(size > 1, total + _value_of(second), total)
        sums = tl.where(group_columns == group, total[:, None], sums)
    group_keys = _keys(sums, group_columns, GROUPS)
    allowed = columns < 0
    for _ in tl.static_range(GROUPS_PER_TOKEN):
        best = tl.max(group_keys, 1)
        group_keys = tl.where(group_keys == best[:, None], -0x7FFFFFFFFFFFFFFF, group_keys)
        chosen = (GROUPS - 1 - (best & 0xFFFFFFFF)).to(tl.int32)
        allowed = allowed | (columns // size == chosen[:, None])
    return tl.where(allowed, keys, -0x7FFFFFFFFFFFFFFF)


@triton.jit
def _softmax(x):
    """Return softmax and logsumexp of rows."""
    maximum = tl.max(x, 1)
    exponential = tl.exp(x - maximum[:, None])
    total = tl.sum(exponential, 1)
    return exponential / total[:, None], maximum + tl.log(total)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _forward_kernel(
    logits_ptr,  # float32 [num_rows, num_experts], in
    bias_ptr,  # float32 [num_experts], in; unused without HAS_BIAS
    experts_ptr,  # int64 [num_rows, K], out
    probabilities_ptr,  # float32 [num_rows, K], out
    counts_ptr,  # int32 [parts, num_sequences, num_experts], out
    sums_ptr,  # float32 [parts, num_sequences, num_experts], out
    z_ptr,  # float32 [parts, num_sequences], out
    tokens,  # of a sequence
    num_sequences,
    num_experts,
    part_tokens,
    scale,
    HAS_BIAS: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PER_TOKEN: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: part_tokens tokens of one sequence."""
    part = tl.program_id(0)
    sequence = tl.program_id(1)
    columns = tl.arange(0, BLOCK)[None, :]
    slots = tl.arange(0, K_BLOCK)[None, :]
    is_expert = columns < num_experts
    counts = tl.zeros([BLOCK], tl.int32)
    sums = tl.zeros([BLOCK], tl.float32)
    z = tl.zeros([ROWS], tl.float32)
    end = tl.minimum(tokens, (part + 1) * part_tokens)
    for first in range(part * part_tokens, end, ROWS):
        token = first + tl.arange(0, ROWS)
        real = token < end
        row = token.to(tl.int64) * num_sequences + sequence
        inside = real[:, None] & is_expert
        x = tl.load(logits_ptr + row[:, None] * num_experts + columns, mask=inside, other=-float("inf"))
        x = tl.where(real[:, None] | (columns > 0), x, 0.0)  # no NaN in rows beyond the end
        softmax, lse = _softmax(x)
        scores = _sigmoid(x) if SIGMOID else softmax
        if SIGMOID:
            scores = tl.where(is_expert, scores, 0.0)
        biased = scores
        if HAS_BIAS:
            biased = scores + tl.load(bias_ptr + columns, mask=is_expert, other=0.0)
            keys = _keys(biased, columns, num_experts)
        else:
            keys = _keys(x, columns, num_experts)
        if GROUPS_PER_TOKEN < GROUPS:
            keys = _without_other_groups(keys, biased, columns, num_experts, GROUPS, GROUPS_PER_TOKEN, GROUP_BLOCK)
        experts = tl.zeros([ROWS, K_BLOCK], tl.int64)
        probabilities = tl.zeros([ROWS, K_BLOCK], tl.float32)
        for k in tl.static_range(K):
            best = tl.max(keys, 1)
            chosen = keys == best[:, None]
            keys = tl.where(chosen, -0x7FFFFFFFFFFFFFFF, keys)
            expert = num_experts - 1 - (best & 0xFFFFFFFF)
            experts = tl.where(slots == k, expert[:, None], experts)
            score = tl.sum(tl.where(chosen, scores, 0.0), 1)
            probabilities = tl.where(slots == k, score[:, None], probabilities)
            counts += tl.sum((chosen & inside).to(tl.int32), 0)
        if NORMALIZE:
            probabilities = probabilities / (tl.sum(probabilities, 1) + _TINY)[:, None]
        kept = real[:, None] & (slots < K)
        tl.store(experts_ptr + row[:, None] * K + slots, experts, mask=kept)
        tl.store(probabilities_ptr + row[:, None] * K + slots, scale * probabilities, mask=kept)
        shares = scores / (tl.sum(scores, 1) + _TINY)[:, None] if SIGMOID else scores
        sums += tl.sum(tl.where(inside, shares, 0.0), 0)
        z += tl.where(real, lse * lse, 0.0)
    place = part.to(tl.int64) * num_sequences + sequence
    column = tl.arange(0, BLOCK)
    tl.store(counts_ptr + place * num_experts + column, counts, mask=column < num_experts)
    tl.store(sums_ptr + place * num_experts + column, sums, mask=column < num_experts)
    tl.store(z_ptr + place, tl.sum(z, 0))


@triton.jit
def _finish_kernel(
    part_counts_ptr,  # int32 [parts, num_sums], in
    part_sums_ptr,  # float32 [parts, num_sums], in
    part_z_ptr,  # float32 [num_z], in
    counts_ptr,  # int64 [num_sums], out
    sums_ptr,  # float32 [num_sums], out
    z_ptr,  # float32 [], out
    parts,
    num_sums,
    num_z,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK of the counts and sums, added in the order of the parts; the first one adds z."""
    program = tl.program_id(0)
    column = program * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_sums
    counts = tl.zeros([BLOCK], tl.int64)
    sums = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        counts += tl.load(part_counts_ptr + column, mask=inside, other=0).to(tl.int64)
        sums += tl.load(part_sums_ptr + column, mask=inside, other=0.0)
        part_counts_ptr += num_sums
        part_sums_ptr += num_sums
    tl.store(counts_ptr + column, counts, mask=inside)
    tl.store(sums_ptr + column, sums, mask=inside)
    if program == 0:
        z = tl.zeros([BLOCK], tl.float32)
        for first in range(0, num_z, BLOCK):
            index = first + tl.arange(0, BLOCK)
            z += tl.load(part_z_ptr + index, mask=index < num_z, other=0.0)
        tl.store(z_ptr, tl.sum(z, 0))


@triton.jit
def _backward_kernel(
    grad_probabilities_ptr,  # float32 [num_rows, K], in
    grad_sums_ptr,  # float32 [num_sequences, num_experts], in
    grad_z_ptr,  # float32 [], in
    logits_ptr,  # float32 [num_rows, num_experts], in
    experts_ptr,  # int64 [num_rows, K], in
    grad_ptr,  # float32 [num_rows, num_experts], out
    num_rows,
    num_sequences,
    num_experts,
    scale,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: ROWS tokens."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < num_rows
    columns = tl.arange(0, BLOCK)[None, :]
    slots = tl.arange(0, K_BLOCK)[None, :]
    is_expert = columns < num_experts
    inside = real[:, None] & is_expert
    x = tl.load(logits_ptr + row[:, None] * num_experts + columns, mask=inside, other=-float("inf"))
    x = tl.where(real[:, None] | (columns > 0), x, 0.0)  # no NaN in rows beyond the end
    softmax, lse = _softmax(x)
    scores = _sigmoid(x) if SIGMOID else softmax
    if SIGMOID:
        scores = tl.where(is_expert, scores, 0.0)
    kept = real[:, None] & (slots < K)
    experts = tl.load(experts_ptr + row[:, None] * K + slots, mask=kept, other=-1)
    grad_chosen = scale * tl.load(grad_probabilities_ptr + row[:, None] * K + slots, mask=kept, other=0.0)
    if NORMALIZE:
        total = tl.zeros([ROWS], tl.float32)
        dot = tl.zeros([ROWS], tl.float32)
        for k in tl.static_range(K):
            expert = tl.sum(tl.where(slots == k, experts, 0), 1)
            score = tl.sum(tl.where(columns == expert[:, None], scores, 0.0), 1)
            total += score
            dot += score * tl.sum(tl.where(slots == k, grad_chosen, 0.0), 1)
        total += _TINY
        grad_chosen = (grad_chosen - (dot / total)[:, None]) / total[:, None]
    sequence = row % num_sequences
    grad = tl.load(grad_sums_ptr + sequence[:, None] * num_experts + columns, mask=inside, other=0.0)
    if SIGMOID:
        total = tl.sum(scores, 1) + _TINY
        grad = (grad - (tl.sum(grad * scores, 1) / total)[:, None]) / total[:, None]
    for k in tl.static_range(K):
        expert = tl.sum(tl.where(slots == k, experts, 0), 1)
        of_expert = tl.sum(tl.where(slots == k, grad_chosen, 0.0), 1)
        grad += tl.where(columns == expert[:, None], of_expert[:, None], 0.0)
    of_z = 2.0 * tl.load(grad_z_ptr) * lse
    if SIGMOID:
        grad = grad * scores * (1.0 - scores) + of_z[:, None] * softmax
    else:
        grad = softmax * (grad - tl.sum(grad * softmax, 1)[:, None] + of_z[:, None])
    tl.store(grad_ptr + row[:, None] * num_experts + columns, grad, mask=inside)


def expert_routing_forward(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    num_selected: int,
    sigmoid: bool,
    normalize: bool,
    scale: float,
    num_groups: int,
    groups_per_token: int,
    num_sequences: int,
) -> tuple[torch.Tensor, ...]:
    """Return experts, probabilities, counts, score_sums and z, as the op of that name."""
    logits = logits.contiguous()
    num_rows, num_experts = logits.shape
    experts = logits.new_empty((num_rows, num_selected), dtype=torch.int64)
    probabilities = logits.new_empty((num_rows, num_selected))
    counts = logits.new_empty((num_sequences, num_experts), dtype=torch.int64)
    score_sums = logits.new_empty((num_sequences, num_experts))
    z = logits.new_empty(())
    tokens = num_rows // num_sequences
    part_tokens = max(_PART_TOKENS, triton.cdiv(tokens, max(1, _MOST_PARTS // num_sequences)))
    parts = triton.cdiv(tokens, part_tokens)
    part_counts = logits.new_empty((parts, *counts.shape), dtype=torch.int32)
    part_sums = logits.new_empty((parts, *counts.shape))
    part_z = logits.new_empty((parts, num_sequences))
    with _on(logits):
        if parts:
            _forward_kernel[(parts, num_sequences)](
                logits,
                logits if bias is None else bias.float().contiguous(),
                experts,
                probabilities,
                part_counts,
                part_sums,
                part_z,
                tokens,
                num_sequences,
                num_experts,
                part_tokens,
                float(scale),
                HAS_BIAS=bias is not None,
                SIGMOID=sigmoid,
                NORMALIZE=normalize,
                GROUPS=num_groups,
                GROUPS_PER_TOKEN=groups_per_token,
                GROUP_BLOCK=triton.next_power_of_2(num_groups),
                **_tile(num_selected, num_experts),
            )
        num_sums = counts.numel()
        _finish_kernel[(triton.cdiv(num_sums, 256),)](
            part_counts, part_sums, part_z, counts, score_sums, z, parts, num_sums, part_z.numel(), BLOCK=256
        )
    return experts, probabilities, counts, score_sums, z


def expert_routing_backward(
    grad_probabilities: torch.Tensor,
    grad_score_sums: torch.Tensor,
    grad_z: torch.Tensor,
    logits: torch.Tensor,
    experts: torch.Tensor,
    sigmoid: bool,
    normalize: bool,
    scale: float,
) -> torch.Tensor:
    """Return the gradient of the logits."""
    logits = logits.contiguous()
    grad = torch.empty_like(logits)
    num_rows, num_experts = logits.shape
    tile = _tile(experts.shape[1], num_experts)
    if num_rows:
        with _on(logits):
            _backward_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
                grad_probabilities.contiguous(),
                grad_score_sums.contiguous(),
                grad_z,
                logits,
                experts,
                grad,
                num_rows,
                grad_score_sums.shape[0],
                num_experts,
                float(scale),
                SIGMOID=sigmoid,
                NORMALIZE=normalize,
                **tile,
            )
    return grad


def _tile(num_selected: int, num_experts: int) -> dict[str, Any]:
    """Return the sizes of a tile of whole rows, and its launch options."""
    block = max(16, triton.next_power_of_2(num_experts))
    return {
        "K": num_selected,
        "K_BLOCK": triton.next_power_of_2(num_selected),
        "ROWS": max(1, min(64, _ELEMENTS // block)),
        "BLOCK": block,
        "num_warps": min(16, max(4, block // 512)),
        "enable_fp_fusion": True,
    }


def _on(x: torch.Tensor) -> Any:
    """Make the device of x the current device, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

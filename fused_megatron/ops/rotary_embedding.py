"""Rotary position embedding of queries and keys, in one kernel launch."""

import itertools
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.checks import InputError, check, check_dtype, check_same_device, check_shape
from fused_megatron.ops.autograd_function import AutogradFunction, is_differentiated
from fused_megatron.ops.registration import FLOAT_DTYPES, define_op
from fused_megatron.reference import rotary_embedding as reference


def _fake(q: torch.Tensor, k: torch.Tensor | None, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return q_out, q.new_empty(0) if k is None else torch.empty_like(k, memory_format=torch.contiguous_format)


_rotary_embedding = define_op(
    "rotary_embedding(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? positions, Tensor? offset,"
    " Tensor? cu_seqlens, int start, int sequence_dim, bool interleaved, bool inverse) -> (Tensor q_out, Tensor k_out)",
    reference=reference.rotary_embedding_forward,
    fake=_fake,
)


class _RotaryEmbedding(AutogradFunction):
    op = "ops.rotary_embedding"

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor | None, tensors: Any, numbers: Any) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.numbers = numbers
        ctx.set_materialize_grads(False)
        q_out, k_out = _rotary_embedding(q, k, *tensors, *numbers, False)
        return q_out, None if k is None else k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor | None, dk: torch.Tensor | None) -> Any:
        # The gradient of a rotation is the inverse rotation.
        if dq is not None:
            dq_in, dk_in = _rotary_embedding(dq, dk, *ctx.saved_tensors, *ctx.numbers, True)
            return dq_in, None if dk is None else dk_in, None, None
        if dk is not None:
            return None, _rotary_embedding(dk, None, *ctx.saved_tensors, *ctx.numbers, True)[0], None, None
        return None, None, None, None


def rotary_embedding(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    sequence_dim: int = 0,
    offset: int | torch.Tensor = 0,
    positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate pairs of elements of every head of q and k by angles that depend on the token's position.

    torch has no such function. With half = Drot / 2 and (c, s) = (cos, sin)[position of the token], every head becomes

        (a, b) -> (a c - b s, b c + a s)
        interleaved=False (GPT-NeoX, Llama):  a = x[0 : half], b = x[half : 2 half]
        interleaved=True  (GPT-J):            a = x[0 : 2 half : 2], b = x[1 : 2 half : 2]

    and x[Drot :] stays unchanged.

    Args:
        q: [S, B, Nq, D] (sequence_dim 0), [B, S, Nq, D] (sequence_dim 1) or [T, Nq, D] (one sequence, or packed ones);
            float32, bfloat16, float16 or float64. If the elements of a head are dense, q is read by its strides without
            a copy: for example views of a fused qkv tensor, or transposed tensors.
        k: like q, with any number of heads Nk; or None.
        cos: [P, Drot / 2], Drot <= D, any of these dtypes.
        sin: as cos.
        interleaved: how elements form pairs, see above.
        sequence_dim: the dim of q that is the sequence.
        offset: position of the first token: an int, or (read on the device, for CUDA graphs and torch.compile) an int64
            tensor with one element, or one per sequence.
        positions: int64 [S], or [S, B] / [B, S] in the order of q's dims: position of each token; without offset.
        cu_seqlens: [n + 1] int32 or int64, from 0 to T, for packed sequences: sequence i has tokens cu_seqlens[i] to
            cu_seqlens[i + 1], and its positions begin again.

    Returns:
        (q_out, k_out) in the shapes and dtypes of q and k, contiguous; k_out is None if k is.

    Raises:
        InputError: shapes, devices or arguments that do not fit; cos or sin that require a gradient (only q and k get
            one); a position outside the tables. Positions in tensors are checked only on the CPU, outside
            torch.compile; on a GPU, where a check would synchronise, such a token becomes NaN.
        TypeError: wrong dtypes.

    Communication: none.

    Memory: saves the tables and positions for backward, not q and k. Reads and writes q and k once; reads a token's
    angles once for all heads.

    Numerics: float32 inside, ONE rounding to the output's dtype. float64 runs on the PyTorch reference. Backward is the
    rotation by the negative angle, and cannot be differentiated again (except in float64).

    Paper: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv:2104.09864.
    """
    _check_tensors(q, k, cos, sin, sequence_dim)
    _check_positions(q, cos, sequence_dim, offset, positions, cu_seqlens)
    start, offset_tensor = (offset, None) if isinstance(offset, int) else (0, offset.contiguous())
    tensors = (cos, sin, positions, offset_tensor, None if cu_seqlens is None else cu_seqlens.contiguous())
    numbers = (start, sequence_dim, interleaved)
    if q.dtype == torch.float64 or cos.dtype == torch.float64:
        q_out, k_out = reference.rotary_embedding_forward(q, k, *tensors, *numbers, False)
    elif is_differentiated():
        return _RotaryEmbedding.apply(q, k, tensors, numbers)
    else:
        q_out, k_out = _rotary_embedding(q, k, *tensors, *numbers, False)
    return q_out, None if k is None else k_out


def _check_tensors(
    q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, sequence_dim: int
) -> None:
    check_dtype("q", q, FLOAT_DTYPES)
    check_dtype("cos", cos, FLOAT_DTYPES)
    check_dtype("sin", sin, (cos.dtype,))
    dims = q.dim()
    if dims not in (3, 4):
        raise InputError(f"q.shape={tuple(q.shape)} must be [S, B, N, D], [B, S, N, D] or packed [T, N, D]")
    if sequence_dim not in ((0,) if dims == 3 else (0, 1)):
        raise InputError(f"sequence_dim={sequence_dim} must be {'0' if dims == 3 else '0 or 1'} for {dims} dims of q")
    if k is not None:
        check_dtype("k", k, (q.dtype,))
        heads = k.shape[-2] if k.dim() == dims else q.shape[-2]
        check_shape("k", k, (*q.shape[:-2], heads, q.shape[-1]))
        check_same_device("k", k, "q", q)
    if cos.dim() != 2 or 2 * cos.shape[1] > q.shape[-1]:
        raise InputError(f"cos.shape={tuple(cos.shape)} must be [positions, at most D / 2 = {q.shape[-1] // 2}]")
    check_shape("sin", sin, cos.shape)
    for name, table in (("cos", cos), ("sin", sin)):
        check_same_device(name, table, "q", q)
        if table.requires_grad:
            raise InputError(f"{name}.requires_grad=True must be False: only q and k get a gradient ({name}.detach())")


def _check_positions(
    q: torch.Tensor,
    cos: torch.Tensor,
    sequence_dim: int,
    offset: int | torch.Tensor,
    positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    seq_len = q.shape[sequence_dim]
    table_rows = cos.shape[0]
    if isinstance(offset, int):
        if offset < 0:
            raise InputError(f"offset={offset} must not be negative")
        if positions is None and cu_seqlens is None:
            if offset + seq_len > table_rows:
                raise InputError(
                    f"offset={offset} + seq_len={seq_len} must be at most cos.shape[0]={table_rows} (longer tables)"
                )
            return
    else:
        check_dtype("offset", offset, (torch.int64,))
        check_same_device("offset", offset, "q", q)
        sequences = q.shape[1 - sequence_dim] if q.dim() == 4 else 1
        sequences = sequences if cu_seqlens is None else cu_seqlens.numel() - 1
        check(
            offset.dim() <= 1 and offset.numel() in (1, sequences),
            f"offset.shape={tuple(offset.shape)} must be () or ({sequences},), one a sequence",
        )
    if positions is not None:
        check(cu_seqlens is None, "positions must not come with cu_seqlens: give one of them")
        check(not isinstance(offset, torch.Tensor) and offset == 0, "offset must be 0 with positions: add it to them")
        check_dtype("positions", positions, (torch.int64,))
        check_shape("positions", positions, (seq_len,) if positions.dim() == 1 or q.dim() == 3 else q.shape[:2])
        check_same_device("positions", positions, "q", q)
    if cu_seqlens is not None:
        check(q.dim() == 3, f"q.shape={tuple(q.shape)} must be [T, N, D] with cu_seqlens")
        check_dtype("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
        check(
            cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0,
            f"cu_seqlens.shape={tuple(cu_seqlens.shape)} must be [n + 1]",
        )
        check_same_device("cu_seqlens", cu_seqlens, "q", q)
    _check_values(q, table_rows, sequence_dim, offset, positions, cu_seqlens)


def _check_values(
    q: torch.Tensor,
    table_rows: int,
    sequence_dim: int,
    offset: int | torch.Tensor,
    positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Raise for a position outside the tables, if the check needs no synchronisation and no graph break."""
    if torch.compiler.is_compiling() or type(q) is not torch.Tensor or q.device.type != "cpu" or q.numel() == 0:
        return
    if positions is not None:
        name, (lowest, highest) = "positions", positions.aminmax()
    else:
        name = "offset" if cu_seqlens is None else "cu_seqlens"
        starts = [offset] if isinstance(offset, int) else offset.reshape(-1).tolist()
        lengths = [q.shape[sequence_dim]]
        if cu_seqlens is not None:
            ends = cu_seqlens.tolist()
            lengths = [end - begin for begin, end in itertools.pairwise(ends)]
            if ends[0] != 0 or ends[-1] != q.shape[0] or min(lengths, default=0) < 0:
                raise InputError(f"cu_seqlens={ends} must ascend from 0 to the number of tokens, {q.shape[0]}")
        count = max(len(starts), len(lengths))  # one of the two may be a single value for all sequences
        starts, lengths = (values * count if len(values) == 1 else values for values in (starts, lengths))
        spans = [(start, start + length - 1) for start, length in zip(starts, lengths, strict=True) if length]
        lowest, highest = min(span[0] for span in spans), max(span[1] for span in spans)
    if lowest < 0 or highest >= table_rows:
        worst = int(lowest if lowest < 0 else highest)
        raise InputError(f"{name}: position {worst} must be in [0, cos.shape[0]={table_rows})")

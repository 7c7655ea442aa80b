"""Rotation of queries and keys in the buffer of a fused query-key-value product, with one buffer for the gradient."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.checks import InputError, check
from fused_megatron.ops.autograd_function import AutogradFunction, is_differentiated
from fused_megatron.ops.registration import define_op
from fused_megatron.ops.rotary_embedding import rotary_embedding
from fused_megatron.reference import rotary_embedding as reference

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _fake(*_: Any) -> None:
    return None


_rotate_out = define_op(
    "rotary_embedding_out(Tensor q, Tensor k, Tensor(a!) q_out, Tensor(b!) k_out, Tensor cos, Tensor sin,"
    " int sequence_dim, bool inverse) -> ()",
    reference=reference.rotary_embedding_out,
    fake=_fake,
)


def split_query_key_value(qkv: torch.Tensor, num_heads: int, num_kv_heads: int, *, head_by_head: bool) -> Heads:
    """Return query [.., N, D], key and value [.., G, D] as views of qkv [.., (N + 2 G) D].

    Args:
        qkv: the result of a fused product.
        num_heads, num_kv_heads: N and G.
        head_by_head: the features are ordered (query, key, value) within a head, and G = N; else all queries come
            first, then all keys, then all values.
    """
    features, total = qkv.shape[-1], num_heads + 2 * num_kv_heads
    if features % total:
        raise InputError(f"qkv.shape={tuple(qkv.shape)} must end in a multiple of num_heads + 2 num_kv_heads = {total}")
    if head_by_head:
        check(num_heads == num_kv_heads, f"num_kv_heads={num_kv_heads} must equal num_heads={num_heads}, head by head")
        query, key, value = qkv.unflatten(-1, (num_heads, 3, features // total)).unbind(-2)
    else:
        heads = qkv.unflatten(-1, (total, features // total))
        query, key, value = heads.split_with_sizes([num_heads, num_kv_heads, num_kv_heads], dim=-2)
    return query, key, value


class _RotaryQueryKeyValue(AutogradFunction):
    """The op under autograd: it overwrites qkv, which its maker does not need in backward."""

    op = "ops.rotary_query_key_value"

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, form: tuple[int, int, bool]) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.form, ctx.shape = form, qkv.shape
        ctx.set_materialize_grads(False)
        return _rotated(qkv.detach(), cos, sin, form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        like = next((each for each in gradients if each is not None), None)
        if like is None:
            return None, None, None, None
        (cos, sin), (num_heads, num_kv_heads, head_by_head) = ctx.saved_tensors, ctx.form
        whole = like.new_empty(ctx.shape)
        parts = split_query_key_value(whole, num_heads, num_kv_heads, head_by_head=head_by_head)
        dq, dk, dv = (
            each.new_zeros(each.shape) if gradient is None else gradient
            for each, gradient in zip(parts, gradients, strict=True)
        )
        # The gradient of a rotation is the inverse rotation.
        _rotate_out(dq, dk, parts[0], parts[1], cos, sin, 0, True)
        parts[2].copy_(dv)
        return whole, None, None, None


def _rotated(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, form: tuple[int, int, bool]) -> Heads:
    query, key, value = split_query_key_value(qkv, form[0], form[1], head_by_head=form[2])
    _rotate_out(query, key, query, key, cos, sin, 0, False)
    return query, key, value


def rotary_query_key_value(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_by_head: bool = False,
) -> Heads:
    """Rotate the queries and keys of a fused product in place; return query, key and value, views of qkv.

    Equals split_query_key_value(qkv, ..) and ops.rotary_embedding(query, key, cos, sin), but without other memory. The
    values of qkv are overwritten: nothing else may read them afterwards.

    Args:
        qkv: [S, B, (N + 2 G) D] or [T, (N + 2 G) D], contiguous, float32, bfloat16, float16 or float64. It may not be
            saved for a backward: the result of a linear layer is not.
        cos, sin: [at least S, Drot / 2], as ops.rotary_embedding (not interleaved).
        num_heads, num_kv_heads, head_by_head: as split_query_key_value.

    Returns:
        query [S, B, N, D], key and value [S, B, G, D].

    Raises:
        InputError: shapes that do not fit; qkv is a leaf that requires a gradient.

    Communication: none.
    Memory: saves the tables. Backward makes one tensor of the size of qkv, which the gradients are written to. Forward
        reads and writes query and key once; backward reads and writes the gradients once.
    Numerics: as ops.rotary_embedding. float64 is not overwritten: it runs on the PyTorch reference.
    """
    form = (num_heads, num_kv_heads, head_by_head)
    if torch.float64 in (qkv.dtype, cos.dtype):
        query, key, value = split_query_key_value(qkv, num_heads, num_kv_heads, head_by_head=head_by_head)
        query, rotated = rotary_embedding(query, key, cos, sin)
        assert rotated is not None
        return query, rotated, value
    check(
        cos.dim() == 2 and sin.shape == cos.shape and cos.shape[0] >= qkv.shape[0],
        f"cos.shape={tuple(cos.shape)} and sin.shape={tuple(sin.shape)} must be [at least {qkv.shape[0]}, Drot / 2]",
    )
    check(qkv.is_contiguous(), f"qkv.stride()={qkv.stride()} must be contiguous: it is overwritten")
    check(not (qkv.is_leaf and qkv.requires_grad), "qkv is a leaf that requires a gradient: it cannot be overwritten")
    if is_differentiated():
        found: Heads = _RotaryQueryKeyValue.apply(qkv, cos, sin, form)
        return found
    return _rotated(qkv, cos, sin, form)

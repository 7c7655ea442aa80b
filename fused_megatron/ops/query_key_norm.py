"""Norm of each head of query and key, and their rotation, in one pass over a fused query-key-value product."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.checks import InputError, check, check_dtype, check_same_device, check_shape
from fused_megatron.ops.autograd_function import AutogradFunction, is_differentiated
from fused_megatron.ops.registration import FLOAT_DTYPES, define_op
from fused_megatron.ops.rms_norm import rms_norm
from fused_megatron.ops.rotary_embedding import rotary_embedding
from fused_megatron.ops.rotary_query_key_value import Heads, split_query_key_value
from fused_megatron.reference import query_key_norm as reference

LARGEST_HEAD = 1024
"""Elements of a head that the kernels take (kLargestNormedHead); larger heads run on rms_norm and rotary_embedding."""


def _fake(*_: Any) -> None:
    return None


def _fake_backward(*tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q_weight, k_weight = tensors[8:10]
    return q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape)


_normalise_out = define_op(
    "query_key_norm_out(Tensor q, Tensor k, Tensor(a!) q_out, Tensor(b!) k_out, Tensor q_weight, Tensor k_weight,"
    " Tensor? cos, Tensor? sin, float eps) -> ()",
    reference=reference.query_key_norm_out,
    fake=_fake,
)
_backward_out = define_op(
    "query_key_norm_backward_out(Tensor dq, Tensor dk, Tensor dv, Tensor q, Tensor k, Tensor(a!) dq_out,"
    " Tensor(b!) dk_out, Tensor(c!) dv_out, Tensor q_weight, Tensor k_weight, Tensor? cos, Tensor? sin, float eps)"
    " -> (Tensor dq_weight, Tensor dk_weight)",
    reference=reference.query_key_norm_backward_out,
    fake=_fake_backward,
)

Form = tuple[int, int, bool]  # num_heads, num_kv_heads, head_by_head


class _QueryKeyNorm(AutogradFunction):
    """The op under autograd: query and key get new memory, since backward reads the heads before the norm."""

    op = "ops.query_key_norm"

    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        eps: float,
        form: Form,
    ) -> Any:
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.eps, ctx.form = eps, form
        ctx.set_materialize_grads(False)
        query, key, value = _split(qkv.detach(), form)
        q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key))
        _normalise_out(query, key, q_out, k_out, q_weight, k_weight, cos, sin, eps)
        return q_out, k_out, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        if all(each is None for each in gradients):
            return (None,) * 7
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        whole = torch.empty_like(qkv)
        query, key, _ = _split(qkv, ctx.form)
        parts = _split(whole, ctx.form)
        dy = [
            each.new_zeros(each.shape) if gradient is None else gradient
            for each, gradient in zip(parts, gradients, strict=True)
        ]
        dq_weight, dk_weight = _backward_out(*dy, query, key, *parts, q_weight, k_weight, cos, sin, ctx.eps)
        return whole, dq_weight, dk_weight, None, None, None, None


def _split(qkv: torch.Tensor, form: Form) -> Heads:
    return split_query_key_value(qkv, form[0], form[1], head_by_head=form[2])


def query_key_norm(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    eps: float | None = None,
    num_heads: int,
    num_kv_heads: int,
    head_by_head: bool = False,
) -> Heads:
    """Normalise each query and key head of a fused product, then rotate it; return query, key and value.

    Equals split_query_key_value(qkv, ..), then for query and key

        ops.rotary_embedding(ops.rms_norm(x, weight, eps), cos, sin)

    in one pass over memory. Without cos and sin nothing is rotated. Where nothing is differentiated, query and key are
    written in place, and the values of qkv are lost. Under autograd they get new memory: backward needs the heads
    before the norm, which cannot be computed from the result where a weight is small or 0.

    Args:
        qkv: [S, B, (N + 2 G) D], contiguous, float32, bfloat16, float16 or float64.
        q_weight, k_weight: [D], any of these dtypes.
        cos, sin: [at least S, Drot / 2] as ops.rotary_embedding (not interleaved), or None.
        eps: added to the mean square of a head; None: as rms_norm.
        num_heads, num_kv_heads, head_by_head: as split_query_key_value.

    Returns:
        query [S, B, N, D], key and value [S, B, G, D]; value is a view of qkv.

    Raises:
        InputError: shapes or devices that do not fit; qkv is not contiguous, or without gradients a leaf that requires
            one.
        TypeError: wrong dtypes.

    Communication: none.

    Memory: saves qkv and the tables; the statistics of the norms are computed again in backward. Backward makes one
    tensor of the size of qkv, which all three gradients are written to. Forward reads and writes query and key once;
    backward reads query, key and the gradients once, and writes the gradients once.

    Numerics: float32 inside, ONE rounding to the output's dtype. The gradients of the weights are summed in float32 in
    a fixed order. float64, and heads of more than 1,024 elements, run on the two ops above. Backward cannot be
    differentiated again (except in float64).

    Papers: Henry et al. 2020, Query-Key Normalization for Transformers, arXiv:2010.04245; Su et al., RoFormer,
    arXiv:2104.09864.
    """
    _check(qkv, (q_weight, k_weight), cos, sin, num_heads + 2 * num_kv_heads)
    form = (num_heads, num_kv_heads, head_by_head)
    dtypes = {qkv.dtype, q_weight.dtype, k_weight.dtype, qkv.dtype if cos is None else cos.dtype}
    if torch.float64 in dtypes or q_weight.numel() > LARGEST_HEAD:
        query, key, value = _split(qkv, form)
        query, key = rms_norm(query, q_weight, eps), rms_norm(key, k_weight, eps)
        if cos is not None and sin is not None:
            query, rotated = rotary_embedding(query, key, cos, sin)
            assert rotated is not None
            key = rotated
        return query, key, value
    if eps is None:
        eps = torch.finfo(torch.float32).eps
    if is_differentiated():
        found: Heads = _QueryKeyNorm.apply(qkv, q_weight, k_weight, cos, sin, eps, form)
        return found
    query, key, value = _split(qkv, form)
    _normalise_out(query, key, query, key, q_weight, k_weight, cos, sin, eps)
    return query, key, value


def _check(
    qkv: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    heads: int,
) -> None:
    check_dtype("qkv", qkv, FLOAT_DTYPES)
    if qkv.dim() != 3 or qkv.shape[2] % heads or not qkv.shape[2]:
        raise InputError(f"qkv.shape={tuple(qkv.shape)} must be [S, B, a multiple of {heads} heads]")
    if not qkv.is_contiguous():
        raise InputError(f"qkv.stride()={qkv.stride()} must be contiguous")
    head_dim = qkv.shape[2] // heads
    for name, weight in zip(("q_weight", "k_weight"), weights, strict=True):
        check_shape(name, weight, (head_dim,))
        check_dtype(name, weight, FLOAT_DTYPES)
        check_same_device(name, weight, "qkv", qkv)
    check((cos is None) == (sin is None), "cos and sin must be given together")
    if cos is None or sin is None:
        return
    check_dtype("cos", cos, FLOAT_DTYPES)
    check_dtype("sin", sin, (cos.dtype,))
    if cos.dim() != 2 or cos.shape[0] < qkv.shape[0] or 2 * cos.shape[1] > head_dim:
        raise InputError(f"cos.shape={tuple(cos.shape)} must be [at least {qkv.shape[0]}, at most {head_dim // 2}]")
    check_shape("sin", sin, cos.shape)
    for name, table in (("cos", cos), ("sin", sin)):
        check_same_device(name, table, "qkv", qkv)
        if table.requires_grad:
            raise InputError(f"{name}.requires_grad=True must be False: it gets no gradient ({name}.detach())")

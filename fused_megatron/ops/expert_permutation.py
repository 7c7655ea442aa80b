"""Tokens in the order of their experts, and the weighted sum of expert outputs back to tokens."""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.checks import InputError, check_dtype, check_positive, check_same_device, check_shape, has_values
from fused_megatron.ops.autograd_function import AutogradFunction, is_differentiated
from fused_megatron.ops.registration import FLOAT_DTYPES, define_op, register_triton
from fused_megatron.reference import expert_permutation as reference


class ExpertOrder(NamedTuple):
    """The pairs of a token and a selected expert, sorted by expert, then token; pair t * K + k is (t, k).

    An order whose rows are cut to the first N is valid, too: the pairs behind them are left out.

    Attributes:
        rows: [T * K] int64; the pair at each place of the sorted order.
        places: [T, K] int64; the place of each pair: the inverse of rows.
        counts: [E] int64; the pairs of each expert.
    """

    rows: torch.Tensor
    places: torch.Tensor
    counts: torch.Tensor


def _fake_order(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return experts.new_empty(experts.numel()), experts.new_empty(experts.shape), experts.new_empty(num_experts)


def _fake_combine_backward(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    places: torch.Tensor,
    weights: torch.Tensor,
    num_rows: int,
    need_y: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_y = grad.new_empty((num_rows, grad.shape[1]) if need_y else 0)
    return grad_y, weights.new_empty(0 if y is None else weights.shape)


_order = define_op(
    "expert_order(Tensor experts, int num_experts) -> (Tensor rows, Tensor places, Tensor counts)",
    reference=reference.expert_order,
    fake=_fake_order,
)
_permute = define_op(
    "expert_permute(Tensor x, Tensor places, int num_rows) -> Tensor",
    reference=reference.expert_permute,
    fake=lambda x, places, num_rows: x.new_empty((num_rows, x.shape[1])),
)
_combine = define_op(
    "expert_combine(Tensor y, Tensor places, Tensor? weights) -> Tensor",
    reference=reference.expert_combine,
    fake=lambda y, places, weights: y.new_empty((places.shape[0], y.shape[1])),
)
_combine_backward = define_op(
    "expert_combine_backward(Tensor grad, Tensor? y, Tensor places, Tensor weights, int num_rows, bool need_y)"
    " -> (Tensor grad_y, Tensor grad_weights)",
    reference=reference.expert_combine_backward,
    fake=_fake_combine_backward,
)
register_triton("expert_order", "expert_permutation")
register_triton("expert_permute", "expert_permutation")
register_triton("expert_combine", "expert_permutation")
register_triton("expert_combine_backward", "expert_permutation")


def order_by_expert(experts: torch.Tensor, num_experts: int) -> ExpertOrder:
    """Sort the pairs of tokens and experts by expert: a stable counting sort.

    Args:
        experts: [T, K] int64; ids in [0, num_experts). A negative id drops its pair: the pair comes after the pairs of
            all experts, and no count includes it.
        num_experts: E.

    Returns:
        ExpertOrder: pairs by expert, then by token, then by k.

    Raises:
        InputError: wrong shape, or on the CPU an id above the last expert. On other devices ids are not read on the
            host, and such a pair is dropped.
        TypeError: ids that are not int64.

    Communication: none. Memory: 16 bytes a pair. Numerics: integers; the same in every run.
    """
    check_dtype("experts", experts, (torch.int64,))
    check_positive("num_experts", num_experts)
    if experts.dim() != 2:
        raise InputError(f"experts.shape={tuple(experts.shape)} must be [tokens, experts of a token]")
    if experts.is_cpu and not torch.compiler.is_compiling() and has_values(experts) and experts.numel():
        largest = int(experts.max())
        if largest >= num_experts:
            raise InputError(f"experts: the id {largest} must be below num_experts={num_experts}")
    return ExpertOrder(*_order(experts.contiguous(), num_experts))


class PermuteTokens(AutogradFunction):
    """Rows of tokens in the order of their experts: apply(x, places, number of rows)."""

    op = "ops.permute_tokens"

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor, num_rows: int) -> torch.Tensor:
        ctx.save_for_backward(places)
        return _permute(x, places, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (places,) = ctx.saved_tensors
        return _combine(grad.contiguous(), places, None), None, None


class CombineTokens(AutogradFunction):
    """Sum of the rows of each token: apply(y, places, weights)."""

    op = "ops.combine_tokens"

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        needs_y = weights is not None and weights.requires_grad
        ctx.save_for_backward(y if needs_y else None, places, weights)
        ctx.num_rows = y.shape[0]
        return _combine(y, places, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        y, places, weights = ctx.saved_tensors
        grad = grad.contiguous()
        if weights is None:
            return _permute(grad, places, ctx.num_rows), None, None
        need_y, _, need_weights = ctx.needs_input_grad
        grad_y, grad_weights = _combine_backward(grad, y, places, weights, ctx.num_rows, need_y)
        return grad_y if need_y else None, None, grad_weights if need_weights else None


def permute_tokens(x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Return the row of its token for each pair of the order: x[rows // K].

    Args:
        x: [T, H] float32, bfloat16, float16 or float64; any strides (copied once if not contiguous).
        order: of T tokens; its rows may be cut to the first N.

    Returns:
        [T * K, H] (or [N, H]) in the dtype of x, contiguous.

    Raises:
        InputError: x and the order do not fit. TypeError: x is not floating point.

    Communication: none.

    Memory: saves the places only. Backward sums the gradients of a token's pairs in the order of k, in float32, and
        rounds once. float64 runs on the PyTorch reference; other dtypes cannot be differentiated twice.
    """
    check_dtype("x", x, FLOAT_DTYPES)
    _check_matrix("x", x, order)
    if x.shape[0] != order.places.shape[0]:
        raise InputError(f"x.shape={tuple(x.shape)} must have the tokens of the order, {order.places.shape[0]}")
    x = x.contiguous()
    if x.dtype == torch.float64:
        return x.index_select(0, order.rows // order.places.shape[1])
    num_rows = order.rows.shape[0]
    if not is_differentiated():
        permuted: torch.Tensor = _permute(x, order.places, num_rows)
        return permuted
    return PermuteTokens.apply(x, order.places, num_rows)


def combine_tokens(y: torch.Tensor, order: ExpertOrder, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sum the rows of each token's pairs: out[t] = sum_k weights[t, k] y[places[t, k]].

    Args:
        y: [T * K, H] float32, bfloat16, float16 or float64, in the order; [N, H] if the order is cut to N pairs. Pairs
            without a row add nothing.
        order: of T tokens.
        weights: [T, K] float32 (float64 if y is), or None: all 1.

    Returns:
        [T, H] in the dtype of y, contiguous.

    Raises:
        InputError: y, weights and the order do not fit. TypeError: wrong dtypes.

    Communication: none.

    Memory: saves y only if the weights have a gradient; weights and places.

    Numerics: sums in float32 in the order of k, one rounding; deterministic. float64 runs on the PyTorch reference;
        other dtypes cannot be differentiated twice.
    """
    check_dtype("y", y, FLOAT_DTYPES)
    _check_matrix("y", y, order)
    check_shape("y", y, (order.rows.shape[0], y.shape[1]))
    if weights is not None:
        check_dtype("weights", weights, (torch.float64 if y.dtype == torch.float64 else torch.float32,))
        check_shape("weights", weights, order.places.shape)
        check_same_device("weights", weights, "y", y)
        weights = weights.contiguous()
    y = y.contiguous()
    if y.dtype == torch.float64:
        return reference.expert_combine(y, order.places, weights)
    if not is_differentiated():
        combined: torch.Tensor = _combine(y, order.places, weights)
        return combined
    return CombineTokens.apply(y, order.places, weights)


class PermuteWeights(AutogradFunction):
    """Weights of pairs in an order: apply(weights, rows, places)."""

    op = "ops.permute_weights"

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return weights.reshape(-1).index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (places,) = ctx.saved_tensors
        num_rows = grad.shape[0]
        if num_rows < places.numel():  # pairs without a row have gradient 0
            grad = torch.cat([grad, grad.new_zeros(1)])
        # The inverse permutation is a gather: torch's own gradient of a gather adds with atomics on a GPU.
        return grad.index_select(0, places.reshape(-1).clamp(max=num_rows)).view(places.shape), None, None


def permute_weights(weights: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Return the weight of each pair of the order: weights.flatten()[rows], for ops.weighted_swiglu.

    Args:
        weights: [T, K] float32 or float64.
        order: of T tokens; its rows may be cut to the first N.

    Returns:
        [T * K] (or [N]) in the dtype of the weights.

    Raises:
        InputError: weights and the order do not fit. TypeError: another dtype.

    Communication: none. Memory: saves the places. Numerics: copies; deterministic.
    """
    check_dtype("weights", weights, (torch.float32, torch.float64))
    check_shape("weights", weights, order.places.shape)
    check_same_device("weights", weights, "order.rows", order.rows)
    if weights.dtype == torch.float64:
        return weights.reshape(-1).index_select(0, order.rows)
    return PermuteWeights.apply(weights, order.rows, order.places)


def _check_matrix(name: str, tensor: torch.Tensor, order: ExpertOrder) -> None:
    if tensor.dim() != 2:
        raise InputError(f"{name}.shape={tuple(tensor.shape)} must be [rows, hidden size]")
    check_same_device(name, tensor, "order.rows", order.rows)

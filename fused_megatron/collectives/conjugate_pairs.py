"""Collectives with gradients, named <forward>_<backward>.

x is this rank's part of some tensor, and the loss is one number that all ranks share. The forward is a linear map on
the tensors of all ranks together, and the backward is its transpose.

No function writes to its input. For a group of None or of size 1 the input itself is returned.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.collectives.groups import Group, group_size, on_ranks
from fused_megatron.collectives.transfers import own_block, start_all_gather, start_all_reduce_, start_reduce_scatter
from fused_megatron.ops.autograd_function import AutogradFunction


def _all_reduce(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    return start_all_reduce_(x.clone(memory_format=torch.contiguous_format), group).wait()


def _all_gather(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    return start_all_gather(x, dim, group).wait()


def _reduce_scatter(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    return start_reduce_scatter(x, dim, group).wait()


def _split(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    return own_block(x, dim, group).clone(memory_format=torch.contiguous_format)


def _identity(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    return x.view_as(x)


class _Pair(AutogradFunction):
    op = "collectives"

    @classmethod
    def op_of(cls, x: torch.Tensor, forward: Any, backward: Any, *others: Any) -> str:
        return f"collectives.{forward.__name__[1:]}{backward.__name__}"

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: Any, backward: Any, dim: int, group: Group) -> torch.Tensor:
        ctx.dual = backward, dim, group
        return forward(x, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        backward, dim, group = ctx.dual
        return backward(dy, dim, group), None, None, None, None


def _apply(x: torch.Tensor, forward: Any, backward: Any, dim: int, group: Group) -> torch.Tensor:
    if group_size(group) == 1:
        return x
    return on_ranks(_Pair, group)(x, forward, backward, dim, group)


def identity_all_reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Pass a replicated tensor to computations that differ by rank.

    forward   y  [..] = x              replicated -> replicated, a view
    backward  dx [..] = sum_r dy_r     partial -> replicated

    Args:
        x: [..] any dtype, the same on every rank.
        group: the ranks; None for this rank only.

    Returns:
        x, as a view.

    Communication: none forward; one all-reduce of x backward.
    Memory: nothing saved; one copy of dy backward.
    """
    return _apply(x, _identity, _all_reduce, 0, group)


def all_reduce_identity(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum the partial results of all ranks.

    forward   y  [..] = sum_r x_r      partial -> replicated
    backward  dx [..] = dy             replicated -> replicated

    Args:
        x: [..] float, this rank's partial sum.
        group: the ranks; None for this rank only.

    Returns:
        [..] the sum, bitwise the same on every rank.

    Communication: one all-reduce of x forward; none backward.
    Memory: nothing saved; one copy of x forward.
    """
    return _apply(x, _all_reduce, _identity, 0, group)


def all_gather_reduce_scatter(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """Gather the shards of all ranks, for computations that differ by rank.

    forward   y  [.., R n, ..] = concatenate_r(x_r)         sharded along dim -> replicated
    backward  dx [.., n, ..]   = own block of sum_r dy_r    partial -> sharded along dim

    Args:
        x: [.., n, ..] any dtype, this rank's shard; the same shape on every rank.
        dim: dim along which the tensor is sharded.
        group: the ranks; None for this rank only.

    Returns:
        [.., R n, ..], contiguous.

    Communication: one all-gather forward, one reduce-scatter backward; each rank sends (R - 1) / R of y in both.
    Memory: nothing saved. If dim is not the first, one more copy of y in each direction.
    """
    return _apply(x, _all_gather, _reduce_scatter, dim, group)


def all_gather_split(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """Gather the shards of all ranks, for computations that are the same on every rank.

    forward   y  [.., R n, ..] = concatenate_r(x_r)    sharded along dim -> replicated
    backward  dx [.., n, ..]   = own block of dy       replicated -> sharded along dim

    Args:
        x: [.., n, ..] any dtype, this rank's shard; the same shape on every rank.
        dim: dim along which the tensor is sharded.
        group: the ranks; None for this rank only.

    Returns:
        [.., R n, ..], contiguous.

    Communication: one all-gather forward; none backward.
    Memory: nothing saved.
    """
    return _apply(x, _all_gather, _split, dim, group)


def reduce_scatter_all_gather(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """Sum the partial results of all ranks and keep this rank's shard.

    forward   y  [.., n / R, ..] = own block of sum_r x_r    partial -> sharded along dim
    backward  dx [.., n, ..]     = concatenate_r(dy_r)       sharded along dim -> replicated

    Args:
        x: [.., n, ..] float, this rank's partial sum.
        dim: dim to shard; its length must be divisible by the number of ranks R.
        group: the ranks; None for this rank only.

    Returns:
        [.., n / R, ..], contiguous.

    Raises:
        InputError: n is not divisible by R.

    Communication: one reduce-scatter forward, one all-gather backward; each rank sends (R - 1) / R of x in both.
    Memory: nothing saved. If dim is not the first, one more copy of x in each direction.
    """
    return _apply(x, _reduce_scatter, _all_gather, dim, group)


def split_all_gather(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """Keep this rank's shard of a replicated tensor.

    forward   y  [.., n / R, ..] = own block of x          replicated -> sharded along dim
    backward  dx [.., n, ..]     = concatenate_r(dy_r)     sharded along dim -> replicated

    Args:
        x: [.., n, ..] any dtype, the same on every rank.
        dim: dim to shard; its length must be divisible by the number of ranks R.
        group: the ranks; None for this rank only.

    Returns:
        [.., n / R, ..], contiguous, a copy.

    Raises:
        InputError: n is not divisible by R.

    Communication: none forward; one all-gather backward.
    Memory: nothing saved.
    """
    return _apply(x, _split, _all_gather, dim, group)


class _IdentityAllReduceTogether(AutogradFunction):
    op = "collectives.identity_all_reduce_together"

    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        needed = [dy for dy, needs in zip(gradients, ctx.needs_input_grad[1:], strict=True) if needs]
        # These tensors are small. They are summed in float32, so that bfloat16 gradients are rounded once, not R times.
        flat = torch.cat([dy.reshape(-1).to(torch.promote_types(dy.dtype, torch.float32)) for dy in needed])
        sums = start_all_reduce_(flat, ctx.group).wait().split([dy.numel() for dy in needed])
        total = iter(s.view(dy.shape).to(dy.dtype) for s, dy in zip(sums, needed, strict=True))
        return None, *(next(total) if needs else None for needs in ctx.needs_input_grad[1:])


def identity_all_reduce_together(tensors: tuple[torch.Tensor, ...], group: Group) -> tuple[torch.Tensor, ...]:
    """identity_all_reduce of several small tensors with one collective, for parameters used on sequence shards.

    forward   y_i  = x_i                replicated -> replicated, views
    backward  dx_i = sum_r dy_i,r       partial -> replicated

    Args:
        tensors: [..] float, the same on every rank.
        group: the ranks; None for this rank only.

    Returns:
        The tensors, as views.

    Communication: none forward; one all-reduce of 4 bytes an element backward.
    Memory: nothing saved; a copy of all gradients backward.
    Numerics: gradients are summed in float32 (float64 for float64) and rounded once to their dtype.
    """
    if group_size(group) == 1:
        return tensors
    return on_ranks(_IdentityAllReduceTogether, group)(group, *tensors)

"""Attention over the keys of all ranks, gathered at once; the gradients return by one reduce-scatter."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from fused_megatron.collectives.transfers import start_all_gather_blocks, start_reduce_scatter_blocks
from fused_megatron.context_parallel.attention_plan import AttentionPlan

Pair = tuple[torch.Tensor, torch.Tensor]


def gather_keys(key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, group: dist.ProcessGroup | None) -> Pair:
    """Return the keys and the values of all ranks, in the order of their positions.

    Args:
        key: [own rows, B, G, D].
        value: [own rows, B, G, Dv].
        plan: a plan for gathered keys.
        group: the ranks; None for this rank only.

    Returns:
        [S, B, G, D] and [S, B, G, Dv].

    Communication: one all-gather of n m B G (D + Dv) elements, with n ranks and m rows of the rank with most rows.
    Memory: the result, and while it is made the gathered blocks, of the same size.
    """
    keys, values = gather_rows((key, value), plan.sizes, plan.order, group)
    return keys, values


def gather_rows(
    tensors: Sequence[torch.Tensor],
    sizes: Sequence[int],
    order: Sequence[tuple[int, int, int]],
    group: dist.ProcessGroup | None,
) -> list[torch.Tensor]:
    """Return the rows of all ranks in the order of their positions.

    Args:
        tensors: [own rows, ..] each, of one dtype.
        sizes: number of rows of each rank, as SequencePartition.sizes.
        order: as SequencePartition.order.
        group: the ranks; None for this rank only.

    Returns:
        For each tensor [rows of all ranks, ..].

    Communication: one all-gather of the tensors, padded to the rows of the rank with most rows.
    """
    if len(sizes) == 1 and len(order) == 1:
        return list(tensors)
    most = max(sizes)
    parts = [_padded(x, most).view(-1) for x in tensors]
    own = parts[0] if len(parts) == 1 else torch.cat(parts)
    blocks = own.new_empty(len(sizes) * own.numel())
    gathered = start_all_gather_blocks(own, blocks, group).wait().view(len(sizes), -1)
    found = []
    for part, like in zip(gathered.split(_widths(most, tensors), dim=1), tensors, strict=True):
        rows = part.view(len(sizes), most, *like.shape[1:])
        found.append(torch.cat([rows[rank, start:stop] for rank, start, stop in order]))
    return found


def scatter_gradients(
    grad_key: torch.Tensor, grad_value: torch.Tensor, plan: AttentionPlan, group: dist.ProcessGroup | None
) -> Pair:
    """Sum the gradients of all keys and values over the ranks, and return the sums for own rows.

    Args:
        grad_key: [S, B, G, D], in the order of the positions.
        grad_value: [S, B, G, Dv].
        plan, group: as in gather_keys.

    Communication: one reduce-scatter of n m B G (D + Dv) elements, as in gather_keys.
    Memory: one copy of both gradients.
    """
    if len(plan.sizes) == 1 and len(plan.order) == 1:
        return grad_key, grad_value
    most, own = max(plan.sizes), plan.sizes[plan.rank]
    widths = _widths(most, (grad_key, grad_value))
    blocks = grad_key.new_zeros(len(plan.sizes), sum(widths))
    for part, gradient in zip(blocks.split(widths, dim=1), (grad_key, grad_value), strict=True):
        rows = part.view(len(plan.sizes), most, *gradient.shape[1:])
        first = 0
        for rank, start, stop in plan.order:
            rows[rank, start:stop] = gradient[first : first + stop - start]
            first += stop - start
    shard = blocks.new_empty(sum(widths))
    if len(plan.sizes) == 1:
        shard = blocks[0]
    else:
        start_reduce_scatter_blocks(blocks.view(-1), shard, group).wait()
    found = [
        part.view(most, *gradient.shape[1:])[:own]
        for part, gradient in zip(shard.split(widths), (grad_key, grad_value), strict=True)
    ]
    return found[0], found[1]


def _widths(rows: int, tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return the number of elements of `rows` rows of each tensor."""
    return [rows * x[0].numel() for x in tensors]


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Return x with `rows` rows, contiguous; the rows after its own are 0."""
    if x.shape[0] == rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])

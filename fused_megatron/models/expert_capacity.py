"""Capacity of experts: which of a sequence's tokens an expert drops, the same in every layout."""

import torch
import torch.nn.functional as F

from fused_megatron.collectives import Group, group_rank, group_size
from fused_megatron.collectives.transfers import start_all_gather
from fused_megatron.sharding import SequencePartition


def within_capacity(experts: torch.Tensor, slots: int, num_experts: int) -> torch.Tensor:
    """Return which pairs (token, expert) stay if an expert takes at most `slots` tokens of each sequence.

    An expert takes the first tokens that selected it, by their position in the sequence.

    Args:
        experts: [S, B, K] int64, the experts of all tokens, in the order of their positions. No token names an expert
            twice.
        slots: largest number of tokens of a sequence that an expert takes.
        num_experts: E.

    Returns:
        [S, B, K] bool.

    Memory: three int64 tensors in the shape of `experts`. The host does not wait for the device.
    """
    batch = experts.shape[1]
    keys = (experts + num_experts * torch.arange(batch, device=experts.device)[:, None]).flatten()
    # Stable, so that each run of one key keeps the order of the positions.
    ordered, order = keys.sort(stable=True)
    first = torch.searchsorted(ordered, ordered)
    index = torch.arange(keys.numel(), device=keys.device) - first
    return torch.empty_like(keys, dtype=torch.bool).scatter_(0, order, index < slots).view(experts.shape)


def kept_pairs(
    experts: torch.Tensor,
    slots: int,
    num_experts: int,
    *,
    rows: int,
    tp_group: Group,
    cp_group: Group,
    partition: SequencePartition | None,
) -> torch.Tensor:
    """Return which pairs of this rank's tokens stay, where several ranks hold parts of each sequence.

    Args:
        experts: [own rows, B, K] int64, the experts of this rank's tokens.
        slots, num_experts: as in within_capacity.
        rows: number of rows that the tensor-parallel ranks hold together.
        tp_group: ranks that hold consecutive blocks of ceil(rows / R) of these rows; None for this rank only.
        cp_group: ranks that hold the positions of `partition`; None for this rank only.
        partition: the positions of each context-parallel rank; None: this rank has all.

    Returns:
        [own rows, B, K] bool.

    Communication: an all-gather of 4 bytes a pair over tp_group, and one over cp_group.
    """
    found = _gather_rows(experts.int(), -(-rows // group_size(tp_group)), tp_group)[:rows]
    own = torch.arange(rows, device=experts.device)
    if partition is not None and group_size(cp_group) > 1:
        most = max(partition.sizes)
        blocks = _gather_rows(found, most, cp_group).split(most)
        own = partition.layouts[group_rank(cp_group)].positions(experts.device)
        found = torch.empty(partition.seq_len, *found.shape[1:], dtype=found.dtype, device=found.device)
        for block, layout in zip(blocks, partition.layouts, strict=True):
            found[layout.positions(found.device)] = block[: layout.num_positions]
    kept = within_capacity(found.long(), slots, num_experts)[own]
    size = -(-rows // group_size(tp_group))
    return kept[group_rank(tp_group) * size :][: experts.shape[0]]


def _gather_rows(x: torch.Tensor, most: int, group: Group) -> torch.Tensor:
    """Return the rows of all ranks, each rank's part padded to `most` rows."""
    if group_size(group) == 1:
        return x
    return start_all_gather(F.pad(x, (0, 0) * (x.dim() - 1) + (0, most - x.shape[0])), 0, group).wait()

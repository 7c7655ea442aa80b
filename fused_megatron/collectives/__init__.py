"""Collectives with gradients, groups, and agreement between ranks."""

from fused_megatron.collectives.conjugate_pairs import (
    all_gather_reduce_scatter,
    all_gather_split,
    all_reduce_identity,
    identity_all_reduce,
    identity_all_reduce_together,
    reduce_scatter_all_gather,
    split_all_gather,
)
from fused_megatron.collectives.groups import Group, group_rank, group_size, on_ranks
from fused_megatron.collectives.transport.select import is_shared, meet

__all__ = [
    "Group",
    "all_gather_reduce_scatter",
    "all_gather_split",
    "all_reduce_identity",
    "group_rank",
    "group_size",
    "identity_all_reduce",
    "identity_all_reduce_together",
    "is_shared",
    "meet",
    "on_ranks",
    "reduce_scatter_all_gather",
    "split_all_gather",
]

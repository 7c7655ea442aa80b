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
from fused_megatron.collectives.groups import Group, apply_on_ranks, group_rank, group_size
from fused_megatron.collectives.transport.shared_memory import is_shared

__all__ = [
    "Group",
    "all_gather_reduce_scatter",
    "all_gather_split",
    "all_reduce_identity",
    "apply_on_ranks",
    "group_rank",
    "group_size",
    "identity_all_reduce",
    "identity_all_reduce_together",
    "is_shared",
    "reduce_scatter_all_gather",
    "split_all_gather",
]

"""Collectives with gradients, and linear products overlapped with theirs."""

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
from fused_megatron.collectives.overlap import AUTO, ChunkChoice, OverlapCosts, chunk_choice, overlap_costs
from fused_megatron.collectives.overlapped_linear import column_linear, row_linear
from fused_megatron.collectives.overlapped_mlp import Activation, mlp
from fused_megatron.collectives.shared_memory import is_shared

__all__ = [
    "AUTO",
    "Activation",
    "ChunkChoice",
    "Group",
    "OverlapCosts",
    "all_gather_reduce_scatter",
    "all_gather_split",
    "all_reduce_identity",
    "apply_on_ranks",
    "chunk_choice",
    "column_linear",
    "group_rank",
    "group_size",
    "identity_all_reduce",
    "identity_all_reduce_together",
    "is_shared",
    "mlp",
    "overlap_costs",
    "reduce_scatter_all_gather",
    "row_linear",
    "split_all_gather",
]

"""Gradients and weights of a model in the placements of a ZeRO stage."""

from collections.abc import Mapping

from torch import nn

from fused_megatron.collectives import Group
from fused_megatron.data_parallel.placement import Placements
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.data_parallel.sharded_weights import ShardedWeights
from fused_megatron.data_parallel.weight_gather import WeightGather
from fused_megatron.mesh import SubMesh
from fused_megatron.sharding import WHOLE_ROWS, RowShards

Weights = WeightGather | ShardedWeights
"""Makes weights whole after an update (stages 0 to 2), or around each use (stage 3)."""


def share_state(
    stages: Mapping[int, nn.Module],
    placements: Placements,
    shards: SubMesh,
    copies: SubMesh,
    dp_group: Group,
    bucket_bytes: float,
    *,
    hides: bool = False,
) -> tuple[GradientBuckets, Weights]:
    """Build the gradients and the weights of this rank. All ranks with the same weights must call this together.

    Args:
        stages: modules by index of the pipeline stage. Frozen parameters have no gradient.
        placements: which tensors are sharded.
        shards: this rank among the ranks that share the rows of each parameter.
        copies: this rank among the ranks that own the same rows.
        dp_group: all ranks with the same weights: shards times copies.
        bucket_bytes: as GradientBuckets.
        hides: as WeightGather.

    Communication, Memory: as the constructors of GradientBuckets, WeightGather and ShardedWeights.
    """
    rows = RowShards(shards.size, shards.rank) if placements.state else WHOLE_ROWS
    gradients = GradientBuckets(
        {index: [p for p in stage.parameters() if p.requires_grad] for index, stage in stages.items()},
        shards.group if placements.state else dp_group,
        bucket_bytes=bucket_bytes,
        rows=rows,
        copies=copies.group if placements.state else None,
        sharded=placements.gradients,
    )
    if placements.weights:
        return gradients, ShardedWeights(stages, rows, shards.group)
    return gradients, WeightGather(gradients.in_order_of_forward(), rows, shards.group, hides)

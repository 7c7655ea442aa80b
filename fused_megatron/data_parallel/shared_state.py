"""Gradients and weights of a model in the placements of a ZeRO stage."""

from collections.abc import Mapping
from math import gcd

from torch import nn

from fused_megatron.data_parallel.placement import Placements
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.data_parallel.sharded_weights import ShardedWeights
from fused_megatron.data_parallel.weight_gather import WeightGather
from fused_megatron.mesh import Mesh, SubMesh
from fused_megatron.sharding import Replicas, ReplicaSet, RowShards

Weights = WeightGather | ShardedWeights
"""Makes weights whole after an update (stages 0 to 2), or around each use (stage 3)."""


def replicas_of(mesh: Mesh, placements: Placements, shard_size: int | None, has_experts: bool) -> Replicas:
    """Return the replicas of a model on a mesh, and the rows that this rank owns of its parameters.

    Args:
        mesh: of all ranks.
        placements: which tensors are sharded.
        shard_size: number of replicas of dense parameters that share rows; None for all. The state of dense parameters
            then has a number of copies, and the state of experts has the same number of copies or a divisor of it.
        has_experts: whether the model has experts, on any pipeline stage; the same on every rank.

    Communication: as Mesh.split_data_parallel; with experts also as Mesh.expert_replicas and split_expert_replicas.
    """
    num_copies = 1 if shard_size is None else mesh.replicas.size // shard_size
    shards, copies = mesh.split_data_parallel(mesh.replicas.size // num_copies)
    dense = _replica_set(mesh.replicas, shards, copies, placements)
    if not has_experts:
        return Replicas(dense, dense)
    replicas = mesh.expert_replicas
    num_shards = replicas.size // gcd(num_copies, replicas.size)
    shards, copies = mesh.split_data_parallel(num_shards, of_experts=True)
    return Replicas(dense, _replica_set(replicas, shards, copies, placements))


def _replica_set(replicas: SubMesh, shards: SubMesh, copies: SubMesh, placements: Placements) -> ReplicaSet:
    if not placements.state:
        return ReplicaSet.of_copies(replicas.group)
    return ReplicaSet(RowShards(shards.size, shards.rank), shards.group, copies.group, replicas.group)


def share_state(
    stages: Mapping[int, nn.Module],
    placements: Placements,
    replicas: Replicas,
    bucket_bytes: float,
    *,
    hides: bool = False,
) -> tuple[GradientBuckets, Weights]:
    """Build the gradients and the weights of this rank. All replicas must call this together.

    Args:
        stages: modules by index of the pipeline stage. Frozen parameters have no gradient.
        placements: which tensors are sharded.
        replicas: of the parameters, with the rows that this rank owns.
        bucket_bytes: as GradientBuckets.
        hides: as WeightGather.

    Communication, Memory: as the constructors of GradientBuckets, WeightGather and ShardedWeights.
    """
    gradients = GradientBuckets(
        {index: [p for p in stage.parameters() if p.requires_grad] for index, stage in stages.items()},
        replicas,
        bucket_bytes=bucket_bytes,
        sharded=placements.gradients,
    )
    if placements.weights:
        return gradients, ShardedWeights(stages, replicas)
    return gradients, WeightGather(gradients.in_order_of_forward(), replicas, hides)

"""Shards of tensors over ranks: boxes, parameter records, initial values, full tensors, norms, sequence positions."""

from fused_megatron.sharding.box import Box, StreamedBox, TensorBox
from fused_megatron.sharding.full_tensor import copy_shard_, full_numel, full_shape, full_tensor, own_shard
from fused_megatron.sharding.grad_scaler import GradScaler
from fused_megatron.sharding.gradient_norm import clip_grad_norm_
from fused_megatron.sharding.initialization import fill_normal_shard_
from fused_megatron.sharding.parameter_record import (
    DeferredWeightGradients,
    ExpertRanks,
    ParameterRecord,
    Shard,
    mark_shard,
    parameter_parts,
    parameter_record,
    parameter_shard,
    update_record,
)
from fused_megatron.sharding.parameter_shard import ParameterShard, ShardPart
from fused_megatron.sharding.partial_gradients import used_by_parts
from fused_megatron.sharding.replica_sets import Replicas, ReplicaSet
from fused_megatron.sharding.row_shards import WHOLE_ROWS, ModelRows, Rows, RowShards
from fused_megatron.sharding.sequence_layout import SequenceLayout
from fused_megatron.sharding.sequence_partition import SequencePartition, balanced_partition
from fused_megatron.sharding.sharded_module import (
    ShardedModule,
    copy_with_groups,
    expert_ranks,
    mark_all_shards,
    parallel_group,
    parts_of_parameters,
)

__all__ = [
    "WHOLE_ROWS",
    "Box",
    "DeferredWeightGradients",
    "ExpertRanks",
    "GradScaler",
    "ModelRows",
    "ParameterRecord",
    "ParameterShard",
    "ReplicaSet",
    "Replicas",
    "RowShards",
    "Rows",
    "SequenceLayout",
    "SequencePartition",
    "Shard",
    "ShardPart",
    "ShardedModule",
    "StreamedBox",
    "TensorBox",
    "balanced_partition",
    "clip_grad_norm_",
    "copy_shard_",
    "copy_with_groups",
    "expert_ranks",
    "fill_normal_shard_",
    "full_numel",
    "full_shape",
    "full_tensor",
    "mark_all_shards",
    "mark_shard",
    "own_shard",
    "parallel_group",
    "parameter_parts",
    "parameter_record",
    "parameter_shard",
    "parts_of_parameters",
    "update_record",
    "used_by_parts",
]

"""How a tensor is cut over ranks: boxes, the shard that a parameter holds, initialisation that no layout changes,
and the positions of a sequence."""

from fused_megatron.sharding.box import StreamedBox, TensorBox
from fused_megatron.sharding.initialization import fill_normal_shard_
from fused_megatron.sharding.parameter_shard import (
    ParameterShard,
    ShardedModule,
    ShardPart,
    mark_shard,
    parameter_parts,
    parameter_shard,
)
from fused_megatron.sharding.sequence_layout import SequenceLayout

__all__ = [
    "ParameterShard",
    "SequenceLayout",
    "ShardPart",
    "ShardedModule",
    "StreamedBox",
    "TensorBox",
    "fill_normal_shard_",
    "mark_shard",
    "parameter_parts",
    "parameter_shard",
]

"""Layers and losses sharded over tensor-parallel ranks, with sequence parallelism as an option."""

from fused_megatron.deprecation import renamed_names
from fused_megatron.sharding import (
    ParameterShard,
    ShardedModule,
    ShardPart,
    fill_normal_shard_,
    mark_shard,
    parameter_parts,
    parameter_shard,
)
from fused_megatron.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from fused_megatron.tensor_parallel.embedding import VocabParallelEmbedding, vocab_parallel_embedding
from fused_megatron.tensor_parallel.layer_norm import SequenceParallelLayerNorm
from fused_megatron.tensor_parallel.linear import (
    ColumnParallelLinear,
    OutputPart,
    RowParallelLinear,
    column_parallel_linear,
    row_parallel_linear,
)
from fused_megatron.tensor_parallel.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from fused_megatron.tensor_parallel.mlp import parallel_mlp
from fused_megatron.tensor_parallel.rms_norm import SequenceParallelRMSNorm
from fused_megatron.tensor_parallel.stacked_linear import StackedColumnParallelLinear

__all__ = [
    "ColumnParallelLinear",
    "OutputPart",
    "ParameterShard",
    "RowParallelLinear",
    "SequenceParallelLayerNorm",
    "SequenceParallelRMSNorm",
    "ShardPart",
    "ShardedModule",
    "StackedColumnParallelLinear",
    "VocabParallelEmbedding",
    "column_parallel_linear",
    "fill_normal_shard_",
    "mark_shard",
    "parallel_mlp",
    "parameter_parts",
    "parameter_shard",
    "row_parallel_linear",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_embedding",
    "vocab_parallel_linear_cross_entropy",
]

__getattr__ = renamed_names(__name__, {"LayerNorm": "SequenceParallelLayerNorm", "RMSNorm": "SequenceParallelRMSNorm"})

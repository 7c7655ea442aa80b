"""Products overlapped with their collectives: chunks, a cost model of chunks, linear layers and the MLP."""

from fused_megatron.overlap.chunk_choice import ChunkChoice, chunk_choice, overlap_costs
from fused_megatron.overlap.cost_model import OverlapCosts
from fused_megatron.overlap.overlapped_linear import ColumnLinearFunction, RowLinearFunction
from fused_megatron.overlap.overlapped_mlp import Activation, MLPFunction

__all__ = [
    "Activation",
    "ChunkChoice",
    "ColumnLinearFunction",
    "MLPFunction",
    "OverlapCosts",
    "RowLinearFunction",
    "chunk_choice",
    "overlap_costs",
]

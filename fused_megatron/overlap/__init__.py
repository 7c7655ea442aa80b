"""Products and the collectives that hide under them: chunks, their cost model, overlapped linear layers and MLP."""

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

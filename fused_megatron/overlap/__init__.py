"""Products and the collectives that hide under them: chunks, their cost model, overlapped linear layers and MLP."""

from fused_megatron.overlap.cost_model import AUTO, ChunkChoice, OverlapCosts, chunk_choice, overlap_costs
from fused_megatron.overlap.overlapped_linear import column_linear, row_linear
from fused_megatron.overlap.overlapped_mlp import Activation, mlp

__all__ = [
    "AUTO",
    "Activation",
    "ChunkChoice",
    "OverlapCosts",
    "chunk_choice",
    "column_linear",
    "mlp",
    "overlap_costs",
    "row_linear",
]

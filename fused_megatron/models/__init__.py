"""GPT and BERT, built from the tensor-parallel layers, and their cut into pipeline stages."""

from fused_megatron.deprecation import renamed_names
from fused_megatron.models.attention import ParallelSelfAttention
from fused_megatron.models.bert import BERT
from fused_megatron.models.block import TransformerBlock
from fused_megatron.models.dropout import BatchSlice
from fused_megatron.models.gpt import GPT
from fused_megatron.models.mixture_of_experts import MixtureOfExperts
from fused_megatron.models.parallel_mlp import ParallelMLP
from fused_megatron.models.registry import new_model
from fused_megatron.models.stack import TransformerStack
from fused_megatron.models.stage_cut import StageSpan, cut_stages

__all__ = [
    "BERT",
    "GPT",
    "BatchSlice",
    "MixtureOfExperts",
    "ParallelMLP",
    "ParallelSelfAttention",
    "StageSpan",
    "TransformerBlock",
    "TransformerStack",
    "cut_stages",
    "new_model",
]

__getattr__ = renamed_names(__name__, {"BatchPosition": "BatchSlice"})

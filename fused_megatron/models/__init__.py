"""Models built from the tensor-parallel layers."""

from fused_megatron.models.attention import SelfAttention
from fused_megatron.models.gpt import GPT
from fused_megatron.models.mlp import MLP
from fused_megatron.models.transformer_block import TransformerBlock

__all__ = ["GPT", "MLP", "SelfAttention", "TransformerBlock"]

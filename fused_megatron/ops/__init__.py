"""Functional fused ops: one device, no collectives."""

from fused_megatron.ops.bias_gelu import bias_gelu
from fused_megatron.ops.layer_norm import layer_norm

__all__ = ["bias_gelu", "layer_norm"]

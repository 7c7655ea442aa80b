"""Functional fused ops: one device, no collectives."""

from fused_megatron.ops.bias_gelu import bias_gelu
from fused_megatron.ops.cross_entropy import (
    cross_entropy,
    cross_entropy_gradient,
    cross_entropy_merge,
    cross_entropy_statistics,
)
from fused_megatron.ops.layer_norm import layer_norm
from fused_megatron.ops.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "bias_gelu",
    "cross_entropy",
    "cross_entropy_gradient",
    "cross_entropy_merge",
    "cross_entropy_statistics",
    "layer_norm",
    "linear_cross_entropy",
]

"""Functional fused ops: one device, no collectives."""

from fused_megatron.ops.bias_gelu import bias_gelu

__all__ = ["bias_gelu"]

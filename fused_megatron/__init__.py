"""Fused kernels, tensor-parallel layers and a trainer for transformers in PyTorch."""

from fused_megatron import ops

__all__ = ["ops"]
__version__ = "0.1.0"

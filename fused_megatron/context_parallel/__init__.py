"""Attention of sequences that are divided over ranks: a ring, gathered keys, heads exchanged for rows, or both."""

from fused_megatron.context_parallel.attention import HeadDropout, context_parallel_attention
from fused_megatron.context_parallel.methods import METHODS, exchange_size, partition_for

__all__ = ["METHODS", "HeadDropout", "context_parallel_attention", "exchange_size", "partition_for"]

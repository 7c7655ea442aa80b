"""Functional fused ops for one device, without collectives."""

from fused_megatron.ops.adamw import adamw_
from fused_megatron.ops.attention import attention
from fused_megatron.ops.bias_dropout_add import bias_dropout_add
from fused_megatron.ops.bias_geglu import bias_geglu
from fused_megatron.ops.bias_gelu import bias_gelu
from fused_megatron.ops.bias_swiglu import bias_swiglu
from fused_megatron.ops.cross_entropy import cross_entropy
from fused_megatron.ops.cross_entropy_shards import (
    cross_entropy_gradient,
    cross_entropy_gradient_,
    cross_entropy_merge,
    cross_entropy_statistics,
)
from fused_megatron.ops.expert_permutation import (
    ExpertOrder,
    combine_tokens,
    order_by_expert,
    permute_tokens,
    permute_weights,
)
from fused_megatron.ops.expert_routing import Routes, RoutingRule, route_tokens
from fused_megatron.ops.layer_norm import layer_norm
from fused_megatron.ops.linear_cross_entropy import linear_cross_entropy
from fused_megatron.ops.query_key_norm import query_key_norm
from fused_megatron.ops.rms_norm import rms_norm
from fused_megatron.ops.rotary_embedding import rotary_embedding
from fused_megatron.ops.scaled_masked_softmax import scaled_masked_softmax
from fused_megatron.ops.sum_of_squares import sum_of_squares
from fused_megatron.ops.weighted_swiglu import weighted_swiglu
from fused_megatron.reference.cross_entropy import LossTerms

__all__ = [
    "ExpertOrder",
    "LossTerms",
    "Routes",
    "RoutingRule",
    "adamw_",
    "attention",
    "bias_dropout_add",
    "bias_geglu",
    "bias_gelu",
    "bias_swiglu",
    "combine_tokens",
    "cross_entropy",
    "cross_entropy_gradient",
    "cross_entropy_gradient_",
    "cross_entropy_merge",
    "cross_entropy_statistics",
    "layer_norm",
    "linear_cross_entropy",
    "order_by_expert",
    "permute_tokens",
    "permute_weights",
    "query_key_norm",
    "rms_norm",
    "rotary_embedding",
    "route_tokens",
    "scaled_masked_softmax",
    "sum_of_squares",
    "weighted_swiglu",
]

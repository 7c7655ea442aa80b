"""Tensor parallelism for existing models: sharding in place, full state dicts, loading of pretrained weights."""

from fused_megatron.interop.add_adapters import add_adapters
from fused_megatron.interop.full_state import full_state_dict, load_full_state_dict
from fused_megatron.interop.parallel_report import ParallelReport
from fused_megatron.interop.parallelize import parallelize
from fused_megatron.interop.pretrained import load_pretrained_shards
from fused_megatron.sharding import clip_grad_norm_, full_tensor

__all__ = [
    "ParallelReport",
    "add_adapters",
    "clip_grad_norm_",
    "full_state_dict",
    "full_tensor",
    "load_full_state_dict",
    "load_pretrained_shards",
    "parallelize",
]

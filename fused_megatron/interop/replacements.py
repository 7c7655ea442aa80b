"""Replacement of planned layers by parallel layers that hold this rank's shards of the weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fused_megatron.collectives import Group, group_size
from fused_megatron.interop.embeddings import ColumnEmbedding, Embedding, embedding_scale
from fused_megatron.interop.layers import GatheredLinear, RowLinear, make_column
from fused_megatron.interop.plans import PARTS
from fused_megatron.interop.split_experts import ExpertSplit, ParallelExperts
from fused_megatron.interop.units import Layer, is_transposed_linear, linear_features
from fused_megatron.sharding import Shard, ShardedModule, copy_shard_, mark_shard, parameter_record

# Attributes that a replacement takes over from the old module: its mode and its hooks.
_KEPT = (
    "training", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


@dataclass(frozen=True)
class Replacement:
    """A planned layer and the parallel module that replaces it."""

    layer: Layer
    module: ShardedModule

    @property
    def parameters(self) -> Iterable[tuple[nn.Parameter, nn.Parameter, str]]:
        """Yield (old, new, name) of each parameter."""
        for name, new in self.module._parameters.items():
            old = self.layer.module._parameters.get(name)
            if old is not None and new is not None:
                yield old, new, name


def make_replacement(layer: Layer, tp_group: Group, overlap: bool | int, expert_split: ExpertSplit) -> Replacement:
    """Make the parallel layer on the meta device."""
    experts = layer.style == "experts"
    module = ParallelExperts(layer.module, expert_split, overlap) if experts else _make(layer, tp_group, overlap)
    if not isinstance(layer.module, nn.Embedding):
        module.transposed = is_transposed_linear(layer.module)
    return taking_over(layer, module)


def taking_over(layer: Layer, module: ShardedModule) -> Replacement:
    """Return the replacement of a layer by a module, which takes over the layer's mode and hooks."""
    for name in _KEPT:
        module.__dict__[name] = layer.module.__dict__[name]
    return Replacement(layer, module)


def _make(layer: Layer, tp_group: Group, overlap: bool | int) -> Any:
    old: Any = layer.module
    dtype = old.weight.dtype
    if layer.style == "embedding_rowwise":
        with torch.random.fork_rng(devices=[]):
            embedding = Embedding(
                old.num_embeddings,
                old.embedding_dim,
                tp_group=tp_group,
                pad_to_multiple_of=1,
                device="meta",
                dtype=dtype,
            )
        embedding.padding_idx = old.padding_idx
        scale = None if type(old) is nn.Embedding else embedding_scale(old)
        embedding.register_buffer("scale", scale, persistent=False)
        return embedding
    if layer.style == "embedding_colwise":
        return ColumnEmbedding(old, tp_group=tp_group)
    outputs, inputs = linear_features(old)
    bias = old.bias is not None
    if layer.style == "colwise_gather_output":
        return GatheredLinear(inputs, outputs, bias, tp_group=tp_group, overlap=overlap, dtype=dtype)
    if layer.style in ("rowwise", "rowwise_split_input"):
        with torch.random.fork_rng(devices=[]):
            return RowLinear(
                inputs,
                outputs,
                bias,
                tp_group=tp_group,
                overlap=overlap,
                device="meta",
                dtype=dtype,
                input_is_parallel=layer.style == "rowwise",
            )
    return make_column(
        inputs,
        outputs,
        bias,
        parts=PARTS.get(layer.style, 1),
        copies=layer.copies,
        tp_group=tp_group,
        overlap=overlap,
        dtype=dtype,
    )


def layout_of(replacement: Replacement, name: str) -> tuple[Any, ...]:
    """Return (shard, transposed, shape) of a parameter. Two layers may share a parameter only if these are equal."""
    module: Any = replacement.module
    shard: Shard = module.shards[name]
    return shard, getattr(module, "transposed", False), tuple(module._parameters[name].shape)


def cut(replacements: Iterable[Replacement], tp_group: Group) -> dict[nn.Parameter, nn.Parameter]:
    """Make this rank's shard of every sharded parameter, by the full parameter; the model is not changed."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for replacement in replacements:
        module: Any = replacement.module
        for old, new, name in replacement.parameters:
            if old not in made:
                made[old] = _cut(old, new, name, module, tp_group)
        if isinstance(module, ParallelExperts):
            module.connect(next(made[old] for old, _, _ in replacement.parameters))
        if hasattr(module, "_measure_overlap"):
            like = made[replacement.layer.module._parameters["weight"]]  # type: ignore[index]
            module._measure_overlap(like.device, like.dtype)
    return made


def _cut(old: nn.Parameter, new: nn.Parameter, name: str, module: Any, tp_group: Group) -> nn.Parameter:
    transposed, record = getattr(module, "transposed", False), parameter_record(new)
    if group_size(tp_group) == 1 and not transposed and record.experts is None:
        return old
    mine = nn.Parameter(torch.empty_like(new, device=old.device), requires_grad=old.requires_grad)
    if old.is_meta:
        return mine
    mark_shard(mine, module.shards[name], record.experts, record.stored_shape)
    copy_shard_(mine, old.detach(), transposed)
    return mine


def become_shards(replacements: Iterable[Replacement], made: dict[nn.Parameter, nn.Parameter]) -> None:
    """Turn the model's parameters into shards, and register them in the parallel layers.

    Parameters stay the same objects, so an optimizer that was made before still updates them.
    """
    for old, mine in made.items():
        if mine is not old and not old.is_inference():
            # Another dtype in between: otherwise a graph that is still alive makes autograd expect the old shape.
            other = torch.float16 if old.dtype == torch.bfloat16 else torch.bfloat16
            old.data = torch.empty(0, dtype=other, device=old.device)
            old.data, old.grad = mine.data, None
    for replacement in replacements:
        module: Any = replacement.module
        for old, _, name in list(replacement.parameters):
            module.register_shard(name, kept(old, made), module.shards[name])


def kept(old: nn.Parameter, made: dict[nn.Parameter, nn.Parameter]) -> nn.Parameter:
    """Return the parameter object to use from now on: the old one, or a new one for an inference tensor (immutable)."""
    return made[old] if old.is_inference() else old

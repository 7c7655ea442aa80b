"""Adapters beside sharded layers: LoRA's matrices and DoRA's magnitudes, in shards as their layer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fused_megatron.collectives import group_rank, group_size
from fused_megatron.collectives.transfers import start_all_reduce_
from fused_megatron.interop.adapters import DROPOUT, FIRST, MAGNITUDE, SECOND
from fused_megatron.interop.layers import ColumnLinear, GatheredLinear, RowLinear
from fused_megatron.interop.replacements import Replacement, taking_over
from fused_megatron.interop.sequence_region import SEQUENCE_DIM
from fused_megatron.interop.units import Layer, linear_features
from fused_megatron.ops.product import product
from fused_megatron.sharding import ParameterShard, Shard, ShardedModule
from fused_megatron.tensor_parallel import OutputPart

# A layer whose adapters are sharded with it.
Host = ColumnLinear | GatheredLinear | RowLinear


class AdapterColumn(ColumnLinear):
    """LoRA's B [O, r] beside a column layer, in the shards of its rows; the r features before it are whole.

    Communication: in backward one all-reduce of the r features. On blocks of the sequence, they are gathered before
        and reduce-scattered in backward, or partial if a hook gathers the sequence for all layers of the module.
    """


class AdapterHead(GatheredLinear):
    """LoRA's B [O, r] beside a layer that gathers its output, such as a head."""


class AdapterRow(RowLinear):
    """LoRA's A [r, I] beside a row layer, in the shards of its columns.

    Communication: in forward one all-reduce (or, on blocks of the sequence, reduce-scatter) of the r features.
    """


class AdapterMagnitude(ShardedModule):
    """DoRA's magnitudes m [O] beside a sharded layer, with PEFT's calls; https://arxiv.org/abs/2402.09353.

        n_o = |row o of W + scaling B A|, without a gradient       y_o = m_o / n_o (W x + scaling B A x)_o

    Beside a column layer m and n are this rank's rows. Beside a row layer they are whole, and the squares of all
    columns are summed over the ranks.

    Args:
        host: the sharded layer.
        shard: this rank's part of m.
        size: number of this rank's magnitudes.
        dtype: their dtype.

    Communication: beside a row layer one all-reduce of [O] in forward, and in merge. Beside a column layer with copies
        one all-reduce of [O] in backward.
    """

    weight: nn.Parameter

    def __init__(self, host: Host, shard: Shard, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.tp_group = host.tp_group
        self.sums_columns = isinstance(host, RowLinear)
        self.register_shard("weight", nn.Parameter(torch.empty(size, device="meta", dtype=dtype)), shard)

    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str | None = None
    ) -> torch.Tensor:
        """Return n of this rank's rows, in the dtype of the weight, from this rank's shards of W and B A."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        squares = (weight.detach().to(wide) + scaling * lora_weight.detach().to(wide)).square().sum(1)
        if self.sums_columns:
            squares = start_all_reduce_(squares, self.tp_group).wait()
        return squares.sqrt().to(weight.dtype)

    @torch.compiler.disable(reason="a collective of fused_megatron")
    def forward(
        self,
        x: torch.Tensor,
        *,
        lora_A: Any,
        lora_B: Any,
        scaling: float,
        base_layer: Host,
        base_result: torch.Tensor | None = None,
        adapter_name: str = "default",
    ) -> torch.Tensor:
        """Return what DoRA adds to the layer's output for x; base_result is that output, where x had no dropout."""
        with torch.no_grad():
            norm = self.get_weight_norm(base_layer.weight, product(lora_B.weight, lora_A.weight.t()), scaling)
        magnitude: torch.Tensor = self.weight
        if isinstance(lora_B, AdapterColumn):
            magnitude = lora_B.with_whole_gradient(magnitude)
        ratio = magnitude / norm.to(magnitude.dtype)
        result = base_layer(x) if base_result is None else base_result
        if base_layer.bias is not None:
            result = result - base_layer.bias
        return (ratio - 1) * result + ratio * lora_B(lora_A(x)) * scaling


class AdapterDropout(nn.Dropout):
    """Dropout of an adapter's input that is one rank's part of an activation: its part of the mask of one process.

    Every rank draws the mask of the whole activation, so that ranks with the same generator stay together.

    Memory: the whole mask, until this rank's part of it is applied.
    """

    host: list[Host]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop elements of x, this rank's features beside a row layer, its rows of the sequence on blocks of it."""
        dim = self._divided_dim()
        if not self.training or self.p == 0.0 or dim is None:
            return super().forward(x)
        group = self.host[0].tp_group
        shape = list(x.shape)
        shape[dim] *= group_size(group)
        mask = F.dropout(x.new_ones(shape), self.p)
        return x * mask.narrow(dim, group_rank(group) * x.shape[dim], x.shape[dim])

    def _divided_dim(self) -> int | None:
        """Return the dim of x that the ranks divide; None if x is whole."""
        host = self.host[0]
        if isinstance(host, RowLinear):
            return -1 if host.input_is_parallel else None
        on_blocks = host.region is not None and host.region.active and not host.gathered
        return SEQUENCE_DIM if on_blocks else None


@dataclass
class ShardedAdapters:
    """The parts of the adapters of one sharded layer.

    Attributes:
        host: the sharded layer.
        replacements: parts in shards.
        whole: the parts that are whole on every rank.
        dropouts: (owner, name, replacement) of the dropouts.
        modules: all modules of the adapters, as they were before.
    """

    host: Host
    replacements: list[Replacement] = field(default_factory=list)
    whole: list[nn.Module] = field(default_factory=list)
    dropouts: list[tuple[nn.Module, str, AdapterDropout]] = field(default_factory=list)
    modules: set[nn.Module] = field(default_factory=set)

    @property
    def heads(self) -> list["AdapterHead"]:
        """The parts beside a layer that gathers its output."""
        return [r.module for r in self.replacements if isinstance(r.module, AdapterHead)]

    def join(self, host: Any) -> None:
        """Give the parts the sequence parallelism of their layer."""
        for part in (replacement.module for replacement in self.replacements):
            if isinstance(part, AdapterColumn | AdapterHead | AdapterRow):
                part.region = host.region
            if isinstance(part, AdapterColumn | AdapterHead):
                part.gathered = host.gathered

    def exchange_dropouts(self) -> None:
        """Put the dropouts into the model."""
        for owner, name, dropout in self.dropouts:
            owner._modules[name] = dropout


def shard_adapters(
    names: Sequence[str], wrapper: Any, host: Any, adapters: Iterable[str] | None = None
) -> ShardedAdapters:
    """Plan the parts of the adapters around a sharded layer, on the meta device.

    Args:
        names: all names of the wrapper.
        wrapper: PEFT's LoRA layer.
        host: the sharded layer.
        adapters: names of the adapters; None for all of them.
    """
    parts = ShardedAdapters(host)
    base = wrapper.get_base_layer()
    parts.modules = {module for module in wrapper.modules() if module not in (wrapper, base)}

    def replace(old: nn.Module, path: str, new: ShardedModule) -> None:
        layer = Layer(tuple(f"{name}.{path}".strip(".") for name in names), old, "adapter")
        parts.replacements.append(taking_over(layer, new))

    for name in wrapper.lora_A if adapters is None else adapters:
        cut, whole = (FIRST, SECOND) if isinstance(host, RowLinear) else (SECOND, FIRST)
        old = getattr(wrapper, cut)[name]
        replace(old, f"{cut}.{name}", _make_part(host, old))
        parts.whole.append(getattr(wrapper, whole)[name])
        if name in wrapper.lora_magnitude_vector:
            old = wrapper.lora_magnitude_vector[name]
            magnitude = make_magnitude(host, old.weight.dtype)
            replace(old, f"{MAGNITUDE}.{name}", magnitude)
            if isinstance(host, RowLinear):
                parts.whole.append(magnitude)
        dropout = getattr(wrapper, DROPOUT)[name]
        if type(dropout) is nn.Dropout:
            parts.dropouts.append((getattr(wrapper, DROPOUT), name, _dropout(dropout, host)))
    return parts


def _make_part(host: Host, old: Any) -> AdapterColumn | AdapterHead | AdapterRow:
    """Make the part of LoRA that is in shards: B beside a column layer, A beside a row layer."""
    outputs, inputs = linear_features(old)
    dtype, bias = old.weight.dtype, old.bias is not None
    if isinstance(host, GatheredLinear):
        return AdapterHead(inputs, outputs, bias, tp_group=host.tp_group, overlap=host.overlap, dtype=dtype)
    if isinstance(host, ColumnLinear):
        return _column_like(host, inputs, bias, dtype)
    with torch.random.fork_rng(devices=[]):  # as in make_column
        return AdapterRow(
            inputs,
            outputs,
            bias,
            tp_group=host.tp_group,
            overlap=host.overlap,
            device="meta",
            dtype=dtype,
            input_is_parallel=host.input_is_parallel,
        )


def _column_like(host: ColumnLinear, inputs: int, bias: bool, dtype: torch.dtype) -> AdapterColumn:
    """Make a column layer with the output features of another one, on the same ranks."""
    ranks, shards = group_size(host.tp_group), host.shards["weight"]
    assert isinstance(shards, tuple)
    parts = []
    for part in shards:
        features = part.shard.full_shape[0]
        parts.append(OutputPart(part.name, features, len(range(host.weight.shape[0])[part.rows]) * ranks // features))
    with torch.random.fork_rng(devices=[]):  # as in make_column
        return AdapterColumn(
            inputs, parts, bias, tp_group=host.tp_group, device="meta", dtype=dtype, overlap=host.overlap
        )


def make_magnitude(host: Host, dtype: torch.dtype) -> AdapterMagnitude:
    """Make DoRA's magnitudes [O] beside a layer, on the meta device: in the shards of a bias of the layer."""
    if isinstance(host, RowLinear):
        shard: Shard = ParameterShard((host.out_features,), (0,), replicated=True)
        return AdapterMagnitude(host, shard, host.out_features, dtype)
    assert isinstance(host, ColumnLinear)
    column = _column_like(host, 1, True, dtype)
    assert column.bias is not None
    return AdapterMagnitude(host, column.shards["bias"], column.bias.numel(), dtype)


def _dropout(old: nn.Dropout, host: Host) -> AdapterDropout:
    made = AdapterDropout(old.p)
    made.host = [host]  # in a list, so that it is no submodule
    return made.train(old.training)

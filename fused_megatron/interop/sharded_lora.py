"""PEFT's LoRA layer around a sharded layer: what it makes, loads and merges has this rank's shards.

Imported only where PEFT is installed and used.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.collectives import group_rank
from fused_megatron.collectives.transfers import start_all_reduce_
from fused_megatron.interop.replacements import become_shards, cut
from fused_megatron.interop.sharded_adapters import GatheredLinear, make_magnitude, shard_adapters
from fused_megatron.interop.summed_parameters import SummedParameters
from fused_megatron.ops.product import product

# Values of init_lora_weights that do not look at the layer's weight.
_BLIND_INITS = (True, False, "gaussian")


class ShardedLora(Linear):
    """PEFT's LoRA around a sharded linear layer.

    Around a column layer A is whole and B has this rank's rows; around a row layer A has this rank's columns and B is
    whole. All else is PEFT's: the parts have shapes for which its forward, merge and unmerge are right.
    """

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is [in, out]. A shard never is, also where the model stores it so."""
        return False

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, value: bool) -> None:
        pass

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> Mapping[Any, Any]:
        """The kinds of LoRA that can be sharded."""
        return {(): None, ("use_dora",): _ShardedDora}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Make an adapter, on all ranks at once; where every rank draws values, the first rank's count.

        Raises:
            InputError: the adapter's initial values depend on the whole weight.
        """
        if config.init_lora_weights not in _BLIND_INITS:
            raise InputError(
                f"init_lora_weights={config.init_lora_weights!r} needs whole weights: make the adapter before "
                f"parallelize (after it: {', '.join(map(repr, _BLIND_INITS))})"
            )
        if config.use_dora and isinstance(self.get_base_layer(), GatheredLinear):
            raise InputError(
                "use_dora=True: DoRA needs the whole output of a layer that gathers it: make the adapter before "
                "parallelize, which then leaves the layer whole"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        if adapter_name not in self.lora_variant:
            _cut_adapter(self, adapter_name)


class _ShardedDora(DoraLinearVariant):
    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Cut the adapter, and compute this rank's magnitudes from its shards."""
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        _cut_adapter(module, adapter_name)
        host = module.get_base_layer()
        first, second = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        made = make_magnitude(host, first.dtype)
        with torch.no_grad():
            norm = made.get_weight_norm(host.weight, product(second, first.t()), module.scaling[adapter_name])
        made.register_shard("weight", nn.Parameter(norm.to(first.dtype)), made.shards["weight"])
        module.lora_magnitude_vector[adapter_name] = made
        _sum_on_blocks(host, [made] if made.sums_columns else [])


def _cut_adapter(wrapper: Any, name: str) -> None:
    """Cut an adapter that PEFT made whole on every rank into the shards of its layer; the first rank's values count."""
    host = wrapper.get_base_layer()
    for module in (wrapper.lora_A[name], wrapper.lora_B[name]):
        for parameter in module.parameters():
            if group_rank(host.tp_group):
                parameter.data.zero_()
            parameter.data = start_all_reduce_(parameter.data, host.tp_group).wait()
    parts = shard_adapters([""], wrapper, host, [name])
    become_shards(parts.replacements, cut(parts.replacements, host.tp_group))
    for replacement in parts.replacements:
        for path in replacement.layer.names:
            parent, _, child = path.rpartition(".")
            wrapper.get_submodule(parent)._modules[child] = replacement.module
    parts.exchange_dropouts()
    parts.join(host)
    for head in parts.heads:
        head.scope = host.scope
    _sum_on_blocks(host, parts.whole)


def _sum_on_blocks(host: Any, modules: list[nn.Module]) -> None:
    """Sum the gradients of whole parts over the ranks, if their layer runs on blocks of the sequence."""
    for module in modules if host.region is not None else []:
        names = [name for name, _ in module.named_parameters(recurse=False)]
        SummedParameters(module, names, host.tp_group).install([])

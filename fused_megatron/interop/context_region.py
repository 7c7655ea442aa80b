"""Context parallelism of a stack of layers by hooks: a rank holds only its own rows of each sequence."""

import copy
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from fused_megatron.checks import InputError
from fused_megatron.collectives import Group, group_rank, group_size
from fused_megatron.context_parallel import context_parallel_attention, partition_for
from fused_megatron.interop.context_mask import ContextMask, make_context_mask
from fused_megatron.interop.refusals import asks_for
from fused_megatron.interop.sequence_region import SEQUENCE_DIM
from fused_megatron.interop.sequence_rows import all_rows, own_rows
from fused_megatron.interop.summed_parameters import SummedParameters
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.sharding import SequencePartition, parallel_group

IMPLEMENTATION = "fused_megatron_context"
"""Name of the attention in transformers' attention interface."""
# Arguments of layers that have the sequence, and its dim. cos and sin are [.., S, D]; position_ids [.., S].
SEQUENCE_DIMS = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1}
_CACHES = ("cache", "past_key_values")


class ContextRegion:
    """A stack of layers whose activations are own rows [B, rows, H] of each sequence while gradients are recorded.

    The sequence is whole before and after the stack. Without gradients (generate, evaluation) every rank runs the whole
    sequence as before.

        first layer    x [B, S, H] -> own rows [B, rows, H]               backward: all-gather
        every layer    cos, sin and position_ids -> own rows
        attention      context_parallel_attention of own queries, keys and values
        last layer     [B, rows, H] -> [B, S, H]                          backward: own rows
        parameters     gradients of own rows are summed over the ranks in backward, module by module

    The layers' attention_mask is a ContextMask, which the model makes through transformers' mask interface. A layer
    that gets one works on own rows. So gradient checkpointing may run a layer again at any time.

    Attributes:
        group: the context-parallel ranks.
        method: as in context_parallel_attention.
        num_heads, num_kv_heads: heads of a rank.
        window: widest window of the layers; None if a layer has none. It decides the positions of each rank.
    """

    def __init__(self, group: Group, method: str, num_heads: int, num_kv_heads: int, window: int | None) -> None:
        self.group = group
        self.method = method
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.window = window
        self._layers: list[nn.Module] = []
        self._summed: set[nn.Module] = set()
        self._configs: list[Any] = []
        self._replaced: list[list[str]] = []

    def install(self, owner: nn.Module, layers: Sequence[nn.Module], attentions: Sequence[nn.Module]) -> None:
        """Install the hooks.

        Args:
            owner: the module whose forward makes the masks and runs the layers.
            layers: the layers, in order.
            attentions: the module in each layer that calls the attention interface.
        """
        register_attention()
        self._layers = list(layers)
        self._configs = list({id(m.config): m.config for m in (owner, *attentions)}.values())
        owner.register_forward_pre_hook(self._enter, with_kwargs=True)
        owner.register_forward_hook(self._leave, always_call=True)
        for layer in layers:
            layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True)
        layers[0].register_forward_pre_hook(self._cut_activations, with_kwargs=True)
        layers[-1].register_forward_hook(self._gather_result, with_kwargs=True)
        for attention in attentions:
            attention.context_region = self  # type: ignore[assignment]
            attention.register_forward_pre_hook(self._enter_attention, with_kwargs=True)
            attention.register_forward_hook(self._leave_attention, with_kwargs=True, always_call=True)

    def partition(self, mask: ContextMask) -> SequencePartition:
        """Return the positions of each rank: the same for all masks of a forward."""
        if mask.partition is None:
            widest = AttentionMask(mask.causal, self.window if mask.causal else None, documents=mask.documents)
            mask.partition = partition_for(
                self.method,
                widest,
                mask.batch,
                mask.seq_len,
                group_size(self.group),
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
            )
        return mask.partition

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: ContextMask,
        scale: float | None,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """Return the attention of own rows.

        Args:
            query, key, value: [B, N, rows, D], [B, G, rows, D] and [B, G, rows, Dv].
            mask: of the whole sequence.
            scale: factor of the scores; None: D^-0.5.
            options: other arguments of the attention, which do not change it.

        Returns:
            [B, rows, N, Dv].
        """
        partition = self.partition(mask)
        padding = mask.padding
        if padding is not None:
            padding = partition.layouts[group_rank(self.group)].take(padding, 1)
        dtype = query.dtype
        if torch.is_autocast_enabled(query.device.type):  # positions may have made query and key float32
            dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.permute(2, 0, 1, 3).to(dtype) for x in (query, key, value))
        visible = AttentionMask(mask.causal, mask.window, padding, mask.documents)
        with torch.autocast(query.device.type, enabled=False):
            context = context_parallel_attention(
                query, key, value, visible, partition=partition, method=self.method, group=self.group, scale=scale
            )
        return context.transpose(0, 1)

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        for name in ("output_hidden_states", "output_attentions"):
            if asks_for(module, kwargs, name):
                raise InputError(
                    f"{name}=True with context parallelism would return this rank's rows (ask for it under "
                    "torch.no_grad())"
                )
        given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        if any(given.get(name) is not None for name in _CACHES):
            raise InputError(
                "context parallelism takes no cache while gradients are recorded: it would hold this rank's rows only "
                "(use torch.no_grad())"
            )
        self._sum_gradients()
        self._replaced.append([_use(config, IMPLEMENTATION) for config in self._configs])

    def _sum_gradients(self) -> None:
        """Sum the gradients of modules in the layers over the ranks, also of modules that were added lately."""
        for module in (one for layer in self._layers for one in layer.modules() if one._parameters):
            if module not in self._summed:
                self._summed.add(module)
                names = [name for name, parameter in module._parameters.items() if parameter is not None]
                SummedParameters(module, names, self.group).install([])

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if not self._replaced:
            return
        self._restore()
        # A cache that the model made has this rank's rows only.
        for name in _CACHES:
            if isinstance(result, dict) and result.get(name) is not None:
                result[name] = None

    def _restore(self) -> None:
        for config, name in zip(self._configs, self._replaced.pop(), strict=True):
            _use(config, name)

    @torch.compiler.disable
    def _enter_layer(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = _mask_in(args, kwargs)
        if mask is None:
            return None
        partition = self.partition(mask)
        names = [*inspect.signature(module.forward).parameters, *map(str, range(len(args)))]
        kept = [self._cut(name, value, partition) for name, value in zip(names[1:], args[1:], strict=False)]
        changed = {
            name: value if name == "hidden_states" else self._cut(name, value, partition)
            for name, value in kwargs.items()
        }
        return (*args[:1], *kept), changed

    def _cut(self, name: str, value: Any, partition: SequencePartition) -> Any:
        """Return own rows of an argument of a layer."""
        dim = SEQUENCE_DIMS.get(name)
        if dim is None:
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                raise InputError(
                    f"context parallelism cannot divide {name}, [{', '.join(map(str, value.shape))}], over the ranks: "
                    f"its layers take a mask, {', '.join(SEQUENCE_DIMS)} (packed documents: give position_ids)"
                )
            return value
        return tree_map_only(
            torch.Tensor, lambda x: own_rows(x, x.dim() + dim, partition, self.group) if x.dim() else x, value
        )

    @torch.compiler.disable
    def _cut_activations(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = _mask_in(args, kwargs)
        if mask is None:
            return None
        partition = self.partition(mask)
        if args:
            return (own_rows(args[0], SEQUENCE_DIM, partition, self.group), *args[1:]), kwargs
        x = own_rows(kwargs["hidden_states"], SEQUENCE_DIM, partition, self.group)
        return args, {**kwargs, "hidden_states": x}

    @torch.compiler.disable
    def _gather_result(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        mask = _mask_in(args, kwargs)
        if mask is None:
            return None
        x, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
        x = all_rows(x, SEQUENCE_DIM, self.partition(mask), self.group)
        return x if rest is None else (x, *rest)

    @torch.compiler.disable
    def _enter_attention(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if _mask_in(args, kwargs) is not None:  # gradient checkpointing runs the layer outside of the owner's forward
            self._replaced.append([_use(config, IMPLEMENTATION) for config in self._configs])

    @torch.compiler.disable
    def _leave_attention(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if _mask_in(args, kwargs) is not None and self._replaced:
            self._restore()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ContextRegion":
        memo[id(self.group)] = self.group  # a process group cannot be copied; both use the same
        twin = memo[id(self)] = ContextRegion(self.group, self.method, self.num_heads, self.num_kv_heads, self.window)
        twin._layers, twin._summed, twin._configs = copy.deepcopy((self._layers, self._summed, self._configs), memo)
        return twin


def groups_of_axes(model: nn.Module) -> dict[str, Group]:
    """Return the groups of ranks, by axis, that share a parallel model; axes of one rank are left out."""
    regions = (module.__dict__.get("context_region") for module in model.modules())
    cp_group = next((region.group for region in regions if region is not None), None)
    groups = {"tensor-parallel": parallel_group(model), "context-parallel": cp_group}
    return {axis: group for axis, group in groups.items() if group_size(group) > 1}


def register_attention() -> None:
    """Add the attention and its masks to transformers' interfaces. No model uses them unless its config names them."""
    transformers: Any = importlib.import_module("transformers")
    transformers.AttentionInterface.register(IMPLEMENTATION, attend_in_context)
    transformers.AttentionMaskInterface.register(IMPLEMENTATION, make_context_mask)


@torch.compiler.disable
def attend_in_context(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as an entry of transformers' AttentionInterface: by the module's context_region.

    Args:
        module: an attention module of a model with context parallelism.
        query, key, value: [B, N, rows, D], [B, G, rows, D] and [B, G, rows, Dv].
        attention_mask: a ContextMask.
        dropout: must be 0.
        scaling: factor of the scores; None: D^-0.5.

    Returns:
        [B, rows, N, Dv], and no weights.

    Raises:
        InputError: another mask, dropout.
    """
    if not isinstance(attention_mask, ContextMask):
        got = "None" if attention_mask is None else f"{list(attention_mask.shape)}"
        raise InputError(
            f"attention_mask={got} of {type(module).__name__} with context parallelism must be the model's own (give "
            "padding as [B, S], and packed documents as position_ids)"
        )
    if dropout > 0:
        raise InputError(
            f"attention dropout of {type(module).__name__}={dropout} with context parallelism must be 0: the ranks "
            "would draw other masks than one process"
        )
    region = module.__dict__["context_region"]
    return region.attend(query, key, value, attention_mask, scaling, options), None


def _use(config: Any, implementation: str) -> str:
    """Change the attention implementation of a config; return the former. Other configs inside it keep theirs."""
    former: str = config._attn_implementation_internal
    config._attn_implementation_internal = implementation
    return former


def _mask_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ContextMask | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, ContextMask)), None)

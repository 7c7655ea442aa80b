"""Full state dicts of a parallel model: gathering them from the shards, and loading them into the shards."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError, dtype_name
from fused_megatron.collectives import group_rank
from fused_megatron.interop.adapters import is_of_adapter
from fused_megatron.interop.split_experts import expert_split
from fused_megatron.sharding import copy_shard_, full_shape, full_tensor, mark_all_shards, own_shard, parallel_group
from fused_megatron.sharding.replica_shards import replica_shards, whole_weights

_CONVERTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_transposed(model: nn.Module) -> dict[torch.Tensor, bool]:
    """Return for every parameter whether the original model stores its transpose (GPT-2: [I, O])."""
    return {
        parameter: bool(getattr(module, "transposed", False))
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    }


def full_state_dict(model: nn.Module, *, rank0_only: bool = False, adapters_only: bool = False) -> dict[str, Any]:
    """Gather the state_dict that the model would have without parallelize: same names, order, shapes and bits.

    To save a Hugging Face model, gather on all ranks, then call save_pretrained on rank 0:

        state = full_state_dict(model, rank0_only=True)
        model.save_pretrained(folder, state_dict=state)

    Args:
        model: after parallelize or shard_data_parallel. A model that is not parallel returns its own state_dict.
        rank0_only: only rank 0 of the ranks that share the weights keeps the tensors; the others return an empty dict.
            All ranks must call.
        adapters_only: only what PEFT trains: adapters (LoRA, DoRA) and modules to save. PeftModel.save_pretrained needs
            no more.

    Returns:
        Tensors on the CPU. Tied parameters share one tensor.

    Communication: two all-gathers per sharded tensor (the shards, and their offsets): the whole model in all. One more
        for each tensor of experts that are split over ep.
    Memory: one full tensor on the model's device, and the whole model on the CPU.
    """
    tp_group = parallel_group(model)
    transposed = is_transposed(model)
    mark_all_shards(model)
    shards = replica_shards(model)
    expert_group = expert_split(model).all_groups
    is_first = group_rank(tp_group) == group_rank(expert_group) == 0
    is_first = is_first and (shards is None or shards.replicas.dense.rows.index == 0)
    keeps = is_first or not rank0_only
    seen: dict[torch.Tensor, torch.Tensor] = {}
    result: dict[str, Any] = {}
    with whole_weights(model):
        for name, value in model.state_dict(keep_vars=True).items():
            if adapters_only and not is_of_adapter(name):
                continue
            if not isinstance(value, torch.Tensor):
                result[name] = value
                continue
            if value not in seen:
                full = full_tensor(value, value, tp_group, transposed.get(value, False))
                seen[value] = full.cpu() if keeps else full.new_empty(0)
            result[name] = seen[value]
    return result if keeps else {}


def load_full_state_dict(model: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> None:
    """Load full tensors, under the names of the original model, into a parallel model; each rank copies its shards.

    Args:
        model: after parallelize or shard_data_parallel, not on the meta device (model.to_empty(device=..) moves it).
        state: tensors, or objects that slice like one (weight_files.StoredWeight, safetensors' get_slice); of these
            only the shards are read. The same on every rank. Floating dtypes are converted to the model's.
        strict: refuse missing and unexpected names; False ignores them. A tied parameter needs one of its names.

    Raises:
        InputError: a missing or unexpected name, a wrong shape or dtype; names the tensor. Nothing was loaded.
    """
    check_full_state(model, state, strict)
    transposed = is_transposed(model)
    with whole_weights(model, changes=True), torch.no_grad():
        for name, value in _targets(model).items():
            if name in state:
                copy_shard_(value, state[name], transposed.get(value, False))


class FullStateLoading:
    """Pre-hook of a parallel model's load_state_dict: it takes full tensors, too, of which each rank loads its shards.

    Libraries that save full tensors (transformers' Trainer, Accelerate) load them by load_state_dict. A state is full
    if any tensor has the full shape and no shard's. Tensors of other shapes are left to torch's own check.
    """

    @torch.compiler.disable
    def __call__(self, model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Replace the full tensors of a state by this rank's shards."""
        transposed = is_transposed(model)
        whole: dict[str, torch.Tensor] = {}  # the parameter by its key, where the state has the full shape
        differs = False
        for name, target in _targets(model).items():
            value: Any = state.get(prefix + name)
            is_tensor = isinstance(value, torch.Tensor)
            if is_tensor and tuple(value.shape) == full_shape(target, transposed.get(target, False)):
                whole[prefix + name] = target
                differs = differs or value.shape != target.shape
        if differs:
            for key, target in whole.items():
                state[key] = own_shard(target, state[key], transposed.get(target, False))


def _targets(model: nn.Module) -> dict[str, torch.Tensor]:
    mark_all_shards(model)
    entries = model.state_dict(keep_vars=True).items()
    return {name: value for name, value in entries if isinstance(value, torch.Tensor)}


def check_full_state(model: nn.Module, state: Mapping[str, Any], strict: bool = True) -> None:
    """Raise the InputError that load_full_state_dict would raise for this state."""
    targets = _targets(model)
    transposed = is_transposed(model)
    found = {targets[name] for name in targets if name in state}
    missing = [name for name, value in targets.items() if value not in found]
    unexpected = [name for name in state if name not in targets]
    if strict and (missing or unexpected):
        what, names = ("has no", missing) if missing else ("has, and the model has not,", unexpected)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise InputError(f"state {what} {names[0]!r}{more} (strict=False passes over them)")
    for name in targets:
        if name in state:
            target = targets[name]
            wanted = full_shape(target, transposed.get(target, False))
            value = state[name]
            shape = tuple(value.get_shape() if hasattr(value, "get_shape") else value.shape)
            if shape != wanted:
                raise InputError(f"state[{name!r}].shape={shape} must be {wanted}")
            _check_dtype(name, getattr(value, "dtype", target.dtype), target.dtype)


def _check_dtype(name: str, found: torch.dtype, wanted: torch.dtype) -> None:
    """Allow another floating precision. Refuse integers, and 8-bit values whose scale is stored elsewhere."""
    if found != wanted and not (wanted.is_floating_point and found in _CONVERTED):
        kinds = ", ".join(map(dtype_name, _CONVERTED)) + ", "
        raise InputError(
            f"state[{name!r}].dtype={dtype_name(found)} must be "
            f"{kinds * wanted.is_floating_point}or {dtype_name(wanted)} "
            "(a quantised one must be dequantised first)"
        )

"""Full state dicts of a parallel model: gathered under the names that the model had, and loaded into its shards."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError, dtype_name
from fused_megatron.sharding import copy_shard_, full_shape, full_tensor, mark_all_shards, parallel_group

_CONVERTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_transposed(model: nn.Module) -> dict[torch.Tensor, bool]:
    """Of every parameter, whether the model had it the other way round (GPT-2)."""
    return {
        parameter: bool(getattr(module, "transposed", False))
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    }


def full_state_dict(model: nn.Module, *, rank0_only: bool = False) -> dict[str, Any]:
    """The state_dict that the model would have without parallelize: same names, order, shapes and values, bit for bit.

    What Hugging Face saves: model.save_pretrained(folder, state_dict=full_state_dict(model)), on rank 0.

    Args:
        model: after parallelize; any other gives its own state_dict.
        rank0_only: only the group's rank 0 keeps the tensors, the others get an empty dict. All ranks must call.

    Returns:
        Tensors on the CPU; tied ones are the same tensor.

    Communication: the whole model, one tensor at a time.
    Memory: one whole tensor where the model is, and the whole model on the CPU.
    """
    tp_group, transposed = parallel_group(model), is_transposed(model)
    mark_all_shards(model)
    keeps = not rank0_only or tp_group is None or tp_group.rank() == 0
    seen: dict[torch.Tensor, torch.Tensor] = {}
    result: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            result[name] = value
            continue
        if value not in seen:
            whole = full_tensor(value, value, tp_group, transposed.get(value, False))
            seen[value] = whole.cpu() if keeps else whole.new_empty(0)
        result[name] = seen[value]
    return result if keeps else {}


def load_full_state_dict(model: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> None:
    """Load whole tensors, under the names of the original model, into a parallel one; each rank takes its part.

    Args:
        model: after parallelize, not on the meta device (model.to_empty(device=..) brings it from there).
        state: tensors, or what slices like one (weight_files.StoredWeight, safetensors' get_slice), so that no whole
            tensor is ever read; the same on every rank. Floating dtypes are converted to the model's.
        strict: refuse names that are missing or left over; else they are passed over. A tied parameter needs one of
            its names.

    Raises:
        InputError: naming the tensor; nothing was loaded.
    """
    check_full_state(model, state, strict)
    transposed = is_transposed(model)
    with torch.no_grad():
        for name, value in _targets(model).items():
            if name in state:
                copy_shard_(value, state[name], transposed.get(value, False))


def _targets(model: nn.Module) -> dict[str, torch.Tensor]:
    mark_all_shards(model)
    entries = model.state_dict(keep_vars=True).items()
    return {name: value for name, value in entries if isinstance(value, torch.Tensor)}


def check_full_state(model: nn.Module, state: Mapping[str, Any], strict: bool = True) -> None:
    """Raise InputError, naming the tensor, unless load_full_state_dict would take these."""
    targets, transposed = _targets(model), is_transposed(model)
    given = {targets[name] for name in targets if name in state}
    missing = [name for name, value in targets.items() if value not in given]
    left_over = [name for name in state if name not in targets]
    if strict and (missing or left_over):
        what, names = ("has no", missing) if missing else ("has, and the model has not,", left_over)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise InputError(f"state {what} {names[0]!r}{more} (strict=False passes over them)")
    for name in targets:
        if name in state:
            wanted = full_shape(targets[name], transposed.get(targets[name], False))
            value = state[name]
            shape = tuple(value.get_shape() if hasattr(value, "get_shape") else value.shape)
            if shape != wanted:
                raise InputError(f"state[{name!r}].shape={shape} must be {wanted}")
            _check_dtype(name, getattr(value, "dtype", targets[name].dtype), targets[name].dtype)


def _check_dtype(name: str, given: torch.dtype, wanted: torch.dtype) -> None:
    """Numbers of another precision are converted; integers, and 8 bits with a scale elsewhere, are other numbers."""
    if given != wanted and not (wanted.is_floating_point and given in _CONVERTED):
        kinds = ", ".join(map(dtype_name, _CONVERTED)) + ", "
        raise InputError(
            f"state[{name!r}].dtype={dtype_name(given)} must be "
            f"{kinds * wanted.is_floating_point}or {dtype_name(wanted)} "
            "(a quantised one must be dequantised first)"
        )

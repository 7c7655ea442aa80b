"""Loading of a pretrained Hugging Face folder into a parallel model; each rank reads only its shards."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.interop.agreement import agreement_of_ranks
from fused_megatron.interop.full_state import check_full_state, load_full_state_dict
from fused_megatron.interop.split_experts import expert_split
from fused_megatron.interop.stored_experts import stack_experts
from fused_megatron.sharding import mark_all_shards, parallel_group
from fused_megatron.weight_files import StoredWeight, WeightFiles

_OTHER_NAMES = " (where transformers renamed tensors, parallelize what its from_pretrained returns)"


def load_pretrained_shards(
    model: nn.Module, folder: str | Path, *, device: torch.device | str | None = None, strict: bool = True
) -> nn.Module:
    """Fill a parallel model, made on the meta device, from a Hugging Face folder of safetensors files.

        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
        parallelize(model, mesh)
        load_pretrained_shards(model, folder)

    Args:
        model: after parallelize; parameters on the meta device become real ones here, others are overwritten.
        folder: holds model.safetensors, or model.safetensors.index.json and the files that it names.
        device: device for the tensors that are on the meta device. None: the device of the model's other parameters,
            else the CPU.
        strict: refuse missing and unexpected tensors. A tensor on the meta device must be in the files in any case.

    Returns:
        The model. Its own class computes buffers that the files lack (rotary frequencies), as in from_pretrained.

    Raises:
        InputError: a file that is missing, truncated or malformed; a tensor that is missing, unexpected or of another
            shape; on every rank, before anything is loaded.

    Communication: one small all-gather.
    Memory: this rank's shards, and this rank's part of one tensor at a time.
    """
    folder = Path(folder)
    group = parallel_group(model)
    target_device = _target_device(model, device)
    with (
        agreement_of_ranks(model, expert_split(model).all_groups, same_weights=False, axis="expert-parallel"),
        agreement_of_ranks(model, group, same_weights=False),
    ):
        state = _names_of(model, stack_experts(model, WeightFiles(folder).tensors))
        try:
            check_full_state(model, state, strict)
        except InputError as error:
            raise InputError(f"{folder}: {error}{_OTHER_NAMES}") from None
        _check_filled(model, state)
    buffers = _materialise(model, target_device)
    # Before the weights: _init_weights computes a buffer, but may also draw the weights of its module.
    _compute_buffers(model, [name for name in buffers if name not in state])
    load_full_state_dict(model, state, strict=strict)
    return model


def _check_filled(model: nn.Module, state: Mapping[str, StoredWeight]) -> None:
    """Raise if a parameter or buffer on the meta device would get no values."""
    filled = {value for name, value in model.state_dict(keep_vars=True).items() if name in state}
    for name, parameter in model.named_parameters():
        if parameter.is_meta and parameter not in filled:
            raise InputError(f"{name} is on the meta device, and no file has it{_OTHER_NAMES}")
    initialise = getattr(model, "_init_weights", None)
    for owner, module in model.named_modules():
        absent = [name for name, b in module._buffers.items() if b is not None and b.is_meta]
        absent = [name for name in absent if f"{owner}.{name}".strip(".") not in state]
        if absent and (initialise is None or not all(p is None or p.is_meta for p in module._parameters.values())):
            raise InputError(
                f"{owner}.{absent[0]} is on the meta device, and no file has it (build the model with buffers off it)"
            )


def _target_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    real = (p.device for p in model.parameters() if not p.is_meta)
    return next(real, torch.device("cpu"))


def _names_of(model: nn.Module, tensors: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    """Return the tensors under the model's names. The files may hold the base model, or the model with a head."""
    names = model.state_dict(keep_vars=True)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    result = {}
    for name, value in tensors.items():
        forms = (name, prefix + name, name.removeprefix(prefix))
        known = next((form for form in forms if form in names), None)
        if known is not None or not any(pattern.search(name) for pattern in ignored):
            result[known or name] = value
    return result


def _materialise(model: nn.Module, device: torch.device) -> list[str]:
    """Allocate all tensors that are on the meta device, tied parameters once; return the names of the buffers."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    buffers = []
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
                buffers.append(f"{prefix}.{name}".strip("."))
    mark_all_shards(model)
    return buffers


def _compute_buffers(model: nn.Module, names: list[str]) -> None:
    """Compute buffers that no file has, by the model's own initialisation of the modules that own them."""
    initialise = getattr(model, "_init_weights", None)
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        assert initialise is not None
        with torch.no_grad():
            initialise(model.get_submodule(owner))

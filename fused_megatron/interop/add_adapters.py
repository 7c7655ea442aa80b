"""add_adapters: PEFT's LoRA adapters for a model that parallelize has changed already."""

import copy
from typing import Any

from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.interop.adapters import innermost, is_saved_copy, wrapped_layers
from fused_megatron.interop.layers import ColumnLinear, GatheredLinear, RowLinear
from fused_megatron.interop.saving import guard_saving
from fused_megatron.optional_packages import install_command
from fused_megatron.sharding import ShardedModule

# Hooks that parallelize put on the model. PeftModel calls the model's forward without them.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def add_adapters(model: nn.Module, config: Any, adapter_name: str = "default", **options: Any) -> Any:
    """Add LoRA adapters to a parallel model: peft.get_peft_model, with adapters in the shards of their layers.

    Before parallelize call peft.get_peft_model itself. Either way the adapters train, save and merge as on one process.

        model = fm.parallelize(model, mesh)
        model = fm.add_adapters(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
        model.load_adapter(folder, "default")  # if there is a saved one

    Args:
        model: after parallelize, or what this returned, for one more adapter. All ranks must call.
        config: a peft.LoraConfig; use_dora and modules_to_save too. target_modules are names, not "all-linear".
        adapter_name: as in PEFT.
        options: as in PEFT.

    Returns:
        The PeftModel.

    Raises:
        ImportError: PEFT is not installed.
        InputError: the model is not parallel; the adapters' initial values need whole weights (PiSSA, OLoRA, ..).

    Communication: one all-reduce of each adapter: the values of the first rank count.
    """
    try:
        import peft  # noqa: PLC0415  optional

        from fused_megatron.interop.sharded_lora import ShardedLora  # noqa: PLC0415  needs PEFT
    except ImportError as error:
        raise ImportError(f"add_adapters needs PEFT: {install_command('peft')}") from error
    if not hasattr(model, "parallel_report"):
        raise InputError("model is not parallel (call peft.get_peft_model, then parallelize)")
    config = copy.deepcopy(config)
    config._register_custom_module(dict.fromkeys((ColumnLinear, RowLinear, GatheredLinear), ShardedLora))
    if isinstance(model, peft.PeftModel):
        model.add_adapter(adapter_name, config, **options)
        _share_with_originals(model)
        return model
    adapted: Any = peft.get_peft_model(model, config, adapter_name, **options)
    _share_with_originals(adapted)
    for name in _HOOKS:
        adapted.__dict__[name].update(model.__dict__[name])
    adapted.parallel_report = model.parallel_report
    guard_saving(adapted)
    return adapted


def _share_with_originals(model: nn.Module) -> None:
    """Give the copies that PEFT made of sharded modules the state that all modules of the model share."""
    for wrapper in model.modules():
        if not is_saved_copy(wrapper) or not isinstance(innermost(wrapper), ShardedModule):
            continue
        copies: list[Any] = [module for _, module in wrapped_layers(wrapper)]
        original = copies.pop(0)
        for saved in copies:
            for name in ("scope", "region", "shared"):
                if name in original.__dict__:
                    saved.__dict__[name] = original.__dict__[name]

"""PEFT's wrappers around layers of a model: LoRA, and modules to save. Found by their structure, without PEFT."""

from collections.abc import Iterator
from typing import Any

from torch import nn

# Names of the modules inside a LoRA layer, each a ModuleDict by name of the adapter.
FIRST, SECOND, MAGNITUDE, DROPOUT = "lora_A", "lora_B", "lora_magnitude_vector", "lora_dropout"
_ORIGINAL, _COPIES = "original_module", "modules_to_save"
# Classes of PEFT's variants of LoRA that can be sharded.
_VARIANTS = ("DoraLinearVariant",)


def _is_of_peft(module: nn.Module, name: str) -> bool:
    kinds = (kind for kind in type(module).__mro__ if kind.__module__.startswith("peft."))
    return any(kind.__name__ == name for kind in kinds)


def is_lora(module: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA around a linear layer, or ours beside shards."""
    return _is_of_peft(module, "LoraLayer") and type(module).__name__ in ("Linear", "ShardedLora")


def is_saved_copy(module: nn.Module) -> bool:
    """Whether a module is PEFT's wrapper of `modules_to_save`: the original module, and trained copies of it."""
    return _is_of_peft(module, "ModulesToSaveWrapper")


def wraps(module: nn.Module) -> bool:
    """Whether a module is a wrapper of PEFT around a layer, whether or not it can be sharded."""
    return _is_of_peft(module, "BaseTunerLayer") or is_saved_copy(module)


def wrapped_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path inside the module, layer) of the layers in a wrapper; ("", module) for any other module."""
    if is_lora(module):
        yield "base_layer", module.get_submodule("base_layer")
    elif is_saved_copy(module):
        yield _ORIGINAL, module.get_submodule(_ORIGINAL)
        yield from ((f"{_COPIES}.{name}", copy) for name, copy in module.get_submodule(_COPIES).named_children())
    else:
        yield "", module


def innermost(module: nn.Module) -> nn.Module:
    """Return the model's own layer inside of wrappers; any other module returns itself."""
    while wraps(module):
        module = module.get_submodule(_ORIGINAL if is_saved_copy(module) else "base_layer")
    return module


def adapter_obstacle(wrapper: Any, style: str) -> str:
    """Return why the adapters of a LoRA layer cannot have shards beside a layer of this style; empty if they can."""
    variants = {type(variant).__name__ for variant in wrapper.lora_variant.values()}
    unknown = sorted(variants.difference(_VARIANTS))
    if unknown:
        return f"a LoRA of the kind {unknown[0]} cannot be sharded (merge it first, or leave the layer out of it)"
    if variants and style == "colwise_gather_output":
        return "DoRA needs the whole output of its layer"
    if wrapper.merged:
        return "its adapters are merged into it (unmerge them first, or unload them)"
    return ""


def is_of_adapter(name: str) -> bool:
    """Whether a name in a state dict is of an adapter or a module to save, and not of the model that is adapted."""
    return any(part.startswith("lora_") or part == _COPIES for part in name.split("."))


def model_names(model: nn.Module) -> list[str]:
    """Return all names of the modules of a model, without the modules inside of PEFT's wrappers."""
    names: list[str] = []
    wrappers: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name and not name.startswith(wrappers):
            names.append(name)
            wrappers += (f"{name}.",) if wraps(module) else ()
    return names


def owners_of_names(model: nn.Module) -> dict[str, str]:
    """Return, for each module inside a wrapper, the name of the wrapper."""
    wrappers = [name for name, module in model.named_modules() if name and wraps(module)]
    return {
        f"{wrapper}.{inner}": wrapper
        for wrapper in wrappers
        for inner, _ in model.get_submodule(wrapper).named_modules()
        if inner
    }


def adapted_models(model: nn.Module) -> list[nn.Module]:
    """Return the model, and the model that a PeftModel holds. PeftModel calls that one's forward, without its hooks."""
    inner = getattr(model, "get_base_model", None)
    if not _is_of_peft(model, "PeftModel") or inner is None:
        return [model]
    return list(dict.fromkeys([model, inner()]))

"""Plan of context parallelism for a model: its stack of layers and their attention, found by a trial on meta."""

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError, check_one_of
from fused_megatron.collectives import Group, group_size
from fused_megatron.context_parallel import METHODS, exchange_size
from fused_megatron.interop.context_mask import ContextMask
from fused_megatron.interop.context_region import IMPLEMENTATION, SEQUENCE_DIMS, ContextRegion, register_attention
from fused_megatron.interop.meta_run import MetaCall, MetaRun

# Sizes of the trial that no dim of a model has by chance.
_BATCH, _SEQ_LEN = 1, 7
_STACK_LAYER = re.compile(r"(?:[^\d.][^.]*\.)*\d+$")
# Arguments of the attention that do not change the scores beyond the mask and the scale.
_PLAIN_OPTIONS = ("dropout", "scaling", "is_causal", "sliding_window", "use_cache", "output_attentions", *SEQUENCE_DIMS)


@dataclass
class ContextPlan:
    """The stack of layers that will run on own rows.

    Attributes:
        name: name of the container of the layers.
        owner: the module whose forward makes the masks and runs the layers.
        layers: the layers, in order.
        attentions: in each layer the module that calls the attention interface.
        region: their context parallelism.
    """

    name: str
    owner: nn.Module
    layers: list[nn.Module]
    attentions: list[nn.Module]
    region: ContextRegion

    @property
    def text(self) -> str:
        """Description for the report."""
        return (
            f"{len(self.layers)} layers of {self.name} while gradients are recorded, attention by {self.region.method}"
        )

    def install(self) -> None:
        """Install the hooks of the region."""
        self.region.install(self.owner, self.layers, self.attentions)


def plan_context(model: nn.Module, group: Group, method: str, tp_size: int) -> ContextPlan | None:
    """Plan context parallelism. The model is not changed.

    Args:
        model: a model of transformers.
        group: the context-parallel ranks; None for one rank: no plan.
        method: as in context_parallel_attention.
        tp_size: tensor-parallel ranks, which share the heads.

    Raises:
        InputError: an unknown method, or a model whose loss or gradients would differ.

    Communication: none.
    """
    check_one_of("context_parallel_method", method, METHODS)
    if group_size(group) == 1:
        return None
    refused = _refused_kind(model)
    if refused:
        raise _refusal(model, refused)
    trial = _Trial()
    ids = torch.zeros(_BATCH, _SEQ_LEN, dtype=torch.int64, device="meta")
    register_attention()
    run = MetaRun(model, MetaCall("", keywords={"input_ids": ids}), trial.change)
    if run.error is not None and not trial.calls:
        raise _refusal(model, f"it does not pass its mask to an attention interface: {run.text}")
    if not trial.calls:
        raise _refusal(model, "its attention does not go through transformers' attention interface")
    refused = trial.refused or (run.text if run.error is not None else "") or _refused_layers(model, trial, run)
    if refused:
        raise _refusal(model, refused)
    container = trial.calls[0].layer.rpartition(".")[0]
    heads, kv_heads = (max(1, number // tp_size) for number in (trial.calls[0].heads, trial.calls[0].kv_heads))
    exchange_size(method, group_size(group), heads, kv_heads)  # raises
    windows = [call.mask.window for call in trial.calls]
    widest = None if None in windows else max(window for window in windows if window is not None)
    return ContextPlan(
        name=container,
        owner=_model_around(model, container),
        layers=[model.get_submodule(call.layer) for call in trial.calls],
        attentions=[model.get_submodule(call.name) for call in trial.calls],
        region=ContextRegion(group, method, heads, kv_heads, widest),
    )


def _model_around(model: nn.Module, container: str) -> nn.Module:
    """Return the innermost model of transformers around a container: its forward makes the masks."""
    name = container
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if hasattr(type(module), "main_input_name"):
            return module
    return model


def _refusal(model: nn.Module, reason: str) -> InputError:
    return InputError(
        f"context_parallel_size above 1: {type(model).__name__}: {reason} (a mesh without cp shards the weights)"
    )


def _refused_kind(model: nn.Module) -> str:
    """Return why a model cannot be tried; empty if it can."""
    config = getattr(model, "config", None)
    if not hasattr(config, "_attn_implementation_internal"):
        return "it is no model of transformers, whose attention interface this needs"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder and a decoder"
    if getattr(model, "main_input_name", None) != "input_ids":
        return f"its input is {getattr(model, 'main_input_name', None)}, not input_ids"
    experts = [
        name for name, value in vars(config).items() if "expert" in name and isinstance(value, int) and value > 1
    ]
    return f"it has experts ({experts[0]}), which count the tokens of all ranks" if experts else ""


@dataclass
class _Call:
    """A call of the attention interface in the trial: name and layer of the module, heads, mask."""

    name: str
    layer: str
    heads: int
    kv_heads: int
    mask: ContextMask


@dataclass
class _Trial:
    """What the attention interface and the layers of a model get.

    Attributes:
        calls: of the attention interface, in order.
        refused: why the first argument that does not fit cannot be divided; empty if all can.
    """

    calls: list[_Call] = field(default_factory=list)
    refused: str = ""
    _layer: str = ""

    def change(self, twin: nn.Module) -> None:
        """Let a copy of the model on the meta device report to this trial."""
        for name, module in twin.named_modules():
            module.__dict__["context_region"] = _Recorder(self, name)
            config = getattr(module, "config", None)
            if hasattr(config, "_attn_implementation_internal"):
                config._attn_implementation_internal = IMPLEMENTATION  # type: ignore[union-attr]
            if _STACK_LAYER.match(name):
                module.register_forward_pre_hook(self._watch_layer(name), with_kwargs=True)

    def _watch_layer(self, layer: str) -> Any:
        def watch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self._layer = layer
            named = zip(list(inspect.signature(module.forward).parameters)[1:], args[1:], strict=False)
            for name, value in (*named, *kwargs.items()):
                if isinstance(value, torch.Tensor) and value.dim() and name not in ("hidden_states", *SEQUENCE_DIMS):
                    self.refused = self.refused or f"its layers take {name}, {list(value.shape)}"

        return watch

    def attend(self, name: str, query: Any, key: Any, value: Any, mask: ContextMask, options: dict[str, Any]) -> Any:
        """Record a call of the attention interface; return a result of the right shape."""
        for option, given in options.items():
            if option not in _PLAIN_OPTIONS and (isinstance(given, torch.Tensor) or (given and given is not True)):
                self.refused = self.refused or f"its attention takes {option}"
        if query.shape[2] != _SEQ_LEN or key.shape[2] != _SEQ_LEN:
            self.refused = self.refused or "its attention reads another sequence"
        self.calls.append(_Call(name, self._layer, query.shape[1], key.shape[1], mask))
        return query.new_empty(*query.shape[:3], value.shape[-1]).transpose(1, 2)


@dataclass
class _Recorder:
    """Stand-in for the region of one module in the trial."""

    trial: _Trial
    name: str

    def attend(self, query: Any, key: Any, value: Any, mask: ContextMask, scale: Any, options: dict[str, Any]) -> Any:
        """Record the call."""
        return self.trial.attend(self.name, query, key, value, mask, options)


def _refused_layers(model: nn.Module, trial: _Trial, run: MetaRun) -> str:
    """Return why the layers that were found cannot run on own rows; empty if they can."""
    names = [call.layer for call in trial.calls]
    container = names[0].rpartition(".")[0]
    children: list[str] = []
    if names[0]:
        children = [f"{container}.{child}".strip(".") for child, _ in model.get_submodule(container).named_children()]
    if names != children:
        return "its attention modules are not one in each layer of one stack"
    if len({(call.heads, call.kv_heads) for call in trial.calls}) > 1:
        return "its layers have different numbers of heads"
    if len({call.mask.causal for call in trial.calls}) > 1:
        return "some of its layers are causal, and some are not"
    for name, module in model.named_modules():
        if not any(name.startswith(f"{layer}.") or name == layer for layer in names):
            continue
        if module._parameters and name not in run.around:
            return f"{name} has parameters, but its forward does not run"
        rate = _dropout_rate(module)
        if rate:
            return f"{name} has dropout {rate}, whose masks would differ from one process: set it to 0"
    return ""


def _dropout_rate(module: nn.Module) -> float:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    rates = (value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float))
    return next((rate for rate in rates if rate > 0), 0.0)

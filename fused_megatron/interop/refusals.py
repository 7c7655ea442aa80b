"""Errors for calls that a sharded model would answer wrongly: hidden states, attention weights, resized embeddings."""

from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError


@torch.compiler.disable
def refuse_hidden_states(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Pre-hook under sequence parallelism: refuse output_hidden_states, since layers return blocks of the sequence."""
    if asks_for(module, kwargs, "output_hidden_states") and torch.is_grad_enabled():
        raise InputError(
            "output_hidden_states=True with sequence_parallel=True would return blocks of the sequence "
            "(ask for them under torch.no_grad(), or parallelize with sequence_parallel=False)"
        )


@torch.compiler.disable
def refuse_attentions(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Pre-hook of a model with sharded attention: refuse output_attentions, since a rank has only its own heads."""
    if asks_for(module, kwargs, "output_attentions"):
        raise InputError(
            "output_attentions=True of a parallel model would return the heads of one rank "
            "(plan={.., 'the attention's linears': 'replicate'} keeps attention whole)"
        )


def asks_for(module: nn.Module, kwargs: dict[str, Any], name: str) -> bool:
    """Return whether a call of a module, or its config, asks for an output."""
    asked = kwargs.get(name)
    return bool(getattr(getattr(module, "config", None), name, False) if asked is None else asked)


class RefusedResizing:
    """Replacement of a model's resize_token_embeddings."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Raise InputError."""
        raise InputError(
            "resize_token_embeddings of a parallel model: its embedding and head are in shards (resize the model "
            "before parallelize; fused_megatron.full_state_dict has the weights for a fresh one)"
        )


def models_inside(model: nn.Module) -> list[nn.Module]:
    """Return the model and every transformers model inside it, since users can call each of them directly."""
    return [m for m in model.modules() if m is model or hasattr(type(m), "main_input_name")]


def guard_answers(model: nn.Module, attention_is_cut: bool) -> None:
    """Install refuse_attentions (if attention_is_cut) and RefusedResizing in a model."""
    for one in models_inside(model):
        if attention_is_cut:
            one.register_forward_pre_hook(refuse_attentions, with_kwargs=True)
        if callable(getattr(one, "resize_token_embeddings", None)):
            one.resize_token_embeddings = RefusedResizing()  # type: ignore[assignment]

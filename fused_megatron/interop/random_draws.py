"""Checks that all ranks that share a model draw the same random numbers, for sampled tokens and dropout masks."""

import zlib
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.collectives.together import gather_json
from fused_megatron.interop.context_region import groups_of_axes
from fused_megatron.interop.split_experts import expert_split


def check_same_draws(model: nn.Module, what: str) -> None:
    """Raise on every rank if the ranks' random generators differ.

    Args:
        model: its device decides which generator is compared.
        what: the use of the random numbers, for the message.

    Raises:
        InputError: the generators differ.

    Communication: one small all-gather for each axis.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    for axis, group in groups_of_axes(model).items():
        states = gather_json(zlib.crc32(state.numpy().tobytes()), group)
        different = [rank for rank, other in enumerate(states) if other != states[0]]
        if different:
            raise InputError(
                f"{what}: {axis} ranks {different} would draw other random numbers than rank 0 "
                "(torch.manual_seed with one seed on all of them)"
            )


class SameDropout:
    """Forward pre-hook: before the first training step of a model with dropout, check that ranks draw equal masks."""

    def __init__(self) -> None:
        self.done = False

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any) -> None:
        """Check, once."""
        if self.done or not (module.training and torch.is_grad_enabled()):
            return
        if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 and m.training for m in module.modules()):
            check_same_draws(module, "dropout")
        self.done = True


class Generate:
    """Replacement of a model's generate that checks the generators: ranks that sample other tokens would hang.

    Ranks of ep have prompts of their own. A rank that has finished takes part in the forwards of the others.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the model's own generate."""
        config = options.get("generation_config") or (args[1] if len(args) > 1 else None)
        config = config or getattr(self.model, "generation_config", None)
        asked = options.get("do_sample")
        if getattr(config, "do_sample", False) if asked is None else asked:
            check_same_draws(self.model, "generate(do_sample=True)")
        if expert_split(self.model).moves_tokens:
            options.setdefault("synced_gpus", True)
        kind: Any = type(self.model)
        return kind.generate(self.model, *args, **options)


def guard_draws(model: nn.Module) -> None:
    """Install the checks in a parallel model."""
    if groups_of_axes(model):
        model.register_forward_pre_hook(SameDropout())
    elif not expert_split(model).moves_tokens:
        return
    if callable(getattr(type(model), "generate", None)):
        model.generate = Generate(model)  # type: ignore[assignment]

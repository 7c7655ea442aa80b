"""Check that the ranks that share a model call it with the same inputs."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.collectives.together import gather_json
from fused_megatron.interop.context_region import groups_of_axes

# Ranks may compute the inputs of a model, for example by a layer before it: floating-point values may differ a little.
_VALUES = 16
_TOLERANCE = 0.05
_MOST_BYTES = 1 << 20


class SameInputs:
    """Forward pre-hook: check the inputs of the first call in training, and of the first call in evaluation.

    Ranks with other samples (a data loader that divides them over all ranks, other prompts) would mix these samples in
    every layer, or wait for each other without end.
    """

    def __init__(self) -> None:
        self.checked: set[bool] = set()

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Raise InputError on every rank if the inputs differ."""
        if module.training in self.checked:
            return
        self.checked.add(module.training)
        named = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
        tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
        ours = {name: _digest(tensor) for name, tensor in sorted(tensors.items())}
        for axis, group in groups_of_axes(module).items():
            ranks = gather_json(ours, group)
            different = [rank for rank, other in enumerate(ranks) if not _same(ranks[0], other)]
            if different:
                raise InputError(
                    f"{axis} ranks {different} have other inputs than rank 0: ranks that share layers need the "
                    "same samples (divide data over data-parallel ranks: mesh.dp_rank of mesh.dp_size; transformers' "
                    "Trainer and accelerator.prepare(data_loader) divide it over all ranks)"
                )


def _digest(tensor: torch.Tensor) -> list[Any]:
    """Return [dtype, shape, values]: the first values, or a checksum of whole numbers."""
    facts = [str(tensor.dtype), list(tensor.shape)]
    if tensor.is_meta or tensor.is_complex():
        return [*facts, 0]
    flat = tensor.detach().flatten()
    if tensor.is_floating_point():
        return [*facts, flat[:_VALUES].nan_to_num().double().tolist()]
    whole = flat[: _MOST_BYTES // tensor.element_size()].cpu().contiguous()
    return [*facts, zlib.crc32(whole.view(torch.uint8).numpy().tobytes())]


def _same(ours: Mapping[str, Sequence[Any]], theirs: Mapping[str, Sequence[Any]]) -> bool:
    if ours.keys() != theirs.keys():
        return False
    for name, (*facts, values) in ours.items():
        *other_facts, others = theirs[name]
        if facts != other_facts:
            return False
        if isinstance(values, list):
            largest = max((abs(v) for v in (*values, *others)), default=0.0)
            if any(abs(a - b) > _TOLERANCE * largest for a, b in zip(values, others, strict=True)):
                return False
        elif values != others:
            return False
    return True


def guard_inputs(model: nn.Module) -> None:
    """Install the check in a parallel model."""
    if groups_of_axes(model):
        model.register_forward_pre_hook(SameInputs(), with_kwargs=True)

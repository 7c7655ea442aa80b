"""Agreement of all ranks before a model is changed: no rank has an error, and all have the same model and weights."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.collectives import Group, group_size
from fused_megatron.collectives.together import failed_ranks, gather_json, gather_outcomes

# Relative. Sums of the same numbers on two kinds of hardware differ by rounding; other weights differ by far more.
_SUM_TOLERANCE = 1e-6


@contextmanager
def agreement_of_ranks(
    model: nn.Module, group: Group, same_weights: bool = True, axis: str = "tensor-parallel"
) -> Iterator[None]:
    """Run the block, then raise on every rank if it failed on any rank, or if the ranks have different models.

    Args:
        model: the model to compare.
        group: the ranks.
        same_weights: compare the values of the parameters too, not only their names, shapes and dtypes.
        axis: name of the ranks, for messages.

    Raises:
        InputError: on every rank, if models or weights differ. If the block failed on some ranks: on the other ranks,
            with the message of the first failed rank; a failed rank raises its own error.

    Communication: one exchange of JSON, and one of two numbers per parameter.
    """
    if group_size(group) == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    # A checksum of 32 bits is enough to find a mistake that nobody planned.
    outcomes = gather_outcomes(group, zlib.crc32(repr(shapes).encode()), error, plain=())
    if error is not None:
        raise error
    failed = failed_ranks(outcomes)
    if failed:
        text = outcomes[failed[0]].error
        raise InputError(f"{axis} ranks {failed} refused this, and nothing was changed: {text}")
    different = [rank for rank, outcome in enumerate(outcomes) if outcome.value != outcomes[0].value]
    if different:
        raise InputError(
            f"model on {axis} ranks {different} has other parameters than on rank 0: build the same on all"
        )
    if same_weights:
        _check_weights(model, group, axis)


def _check_weights(model: nn.Module, group: Group, axis: str) -> None:
    names, values = [], []
    for name, parameter in model.named_parameters():
        # torch cannot sum the 8-bit dtypes of quantised models.
        if parameter.is_meta or not parameter.is_floating_point() or parameter.itemsize == 1:
            continue
        plain = parameter.detach()
        names.append(name)
        values += [float(plain.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(plain, dtype=torch.float64))]
    if not values:
        return
    gathered = torch.tensor(gather_json(values, group), dtype=torch.float64).view(group_size(group), -1, 2)
    differs = (gathered - gathered[:1]).abs().amax((0, 2)) > _SUM_TOLERANCE * gathered[0, :, 1]
    if differs.any():
        name = names[int(differs.nonzero()[0])]
        raise InputError(
            f"{name} has other values on other {axis} ranks (load the same weights on all, or call "
            "torch.manual_seed with one seed before building the model)"
        )

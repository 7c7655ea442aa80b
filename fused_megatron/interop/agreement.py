"""What holds on all ranks before a model is changed: no error anywhere, one model, one set of weights."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.collectives import Group, group_size
from fused_megatron.collectives.transfers import start_all_gather

# Sums of the same numbers on two kinds of hardware differ by rounding; other weights differ by far more.
_SAME = 1e-6


def model_device(model: nn.Module, mesh: Any) -> torch.device:
    """Where small tensors for the group must lie: with the model, or where the mesh says."""
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("meta")}
    if devices:
        return next(iter(devices))
    mesh = getattr(mesh, "device_mesh", mesh)
    kind = getattr(mesh, "device_type", "cpu")
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _from_all(values: list[float], group: Group, device: torch.device) -> torch.Tensor:
    """[R, n] float64."""
    mine = torch.tensor([values], dtype=torch.float64, device=device)
    return start_all_gather(mine, 0, group).wait().cpu()


@contextmanager
def check_agreement(model: nn.Module, group: Group, device: torch.device, same_weights: bool = True) -> Iterator[None]:
    """Raise on every rank what the block raises on any of them; before that, unless the ranks' models are alike.

    Raises:
        InputError: on the ranks where the block did not fail by itself, naming those where it did; on all, where models
            or weights differ.

    Communication: two all-gathers, of 16 bytes and of 16 a parameter.
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
    # The shapes in 32 bits: enough to tell an honest mistake.
    all_ranks = _from_all([float(error is not None), float(zlib.crc32(repr(shapes).encode()))], group, device)
    if error is not None:
        raise error
    failed = [rank for rank, flag in enumerate(all_ranks[:, 0].tolist()) if flag]
    if failed:
        raise InputError(f"tensor-parallel ranks {failed} refused this: the message is theirs; nothing was changed")
    different = [rank for rank, digest in enumerate(all_ranks[:, 1].tolist()) if digest != all_ranks[0, 1]]
    if different:
        raise InputError(
            f"model on tensor-parallel ranks {different} has other parameters than on rank 0: build the same on all"
        )
    if same_weights:
        _check_weights(model, group, device)


def _check_weights(model: nn.Module, group: Group, device: torch.device) -> None:
    names, values = [], []
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            continue
        plain = parameter.detach()
        names.append(name)
        values += [float(plain.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(plain, dtype=torch.float64))]
    if not values:
        return
    gathered = _from_all(values, group, device).view(group_size(group), -1, 2)
    apart = (gathered - gathered[:1]).abs().amax((0, 2)) > _SAME * gathered[0, :, 1]
    if apart.any():
        name = names[int(apart.nonzero()[0])]
        raise InputError(
            f"{name} has other values on other tensor-parallel ranks (load the same weights on all, or call "
            "torch.manual_seed with one seed before building the model)"
        )

"""Comparison of a sharded model with the full model: perturbed norms and biases, and errors of the gradients."""

from collections.abc import Callable

import torch
from torch import nn

from fused_megatron.sharding import parts_of_parameters


def perturb_vectors_(model: nn.Module) -> None:
    """Add noise, the same for every layout, to norms and biases: at 1 and 0 some errors would have no effect."""
    parts = parts_of_parameters(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() != 1:
            continue
        for part in parts[parameter]:
            generator = torch.Generator().manual_seed(len(part.full_name(name)))
            full = 0.1 * torch.randn(part.shard.full_shape, generator=generator)
            held = part.held(parameter.data)
            held.tensor.add_(full[held.box.slices()].to(parameter.dtype))


def full_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of a model on one rank, by the names of the full parameters."""
    parts = parts_of_parameters(model)
    return {
        part.full_name(name): part.of(parameter.grad)
        for name, parameter in model.named_parameters()
        for part in parts[parameter]
        if parameter.grad is not None
    }


def gradient_errors(
    model: nn.Module,
    full_gradient: Callable[[str], torch.Tensor],
    relative_to: Callable[[str], str] = lambda name: name,
) -> dict[str, float]:
    """Return, for each full parameter, the largest error of this rank's gradient / largest value of the full gradient.

    Args:
        model: a model whose parameters all have gradients.
        full_gradient: maps the name of a full parameter to its correct gradient.
        relative_to: maps the name of a parameter to the parameter whose full gradient is the denominator.

    Returns:
        Errors by name; 0 if this rank has only padding.
    """
    errors = {}
    parts = parts_of_parameters(model)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        for part in parts[parameter]:
            key = part.full_name(name)
            held = part.held(parameter.grad)
            full = full_gradient(key)
            measure = relative_to(key)
            error = (held.tensor - full[held.box.slices()]).abs()
            scale = (full if measure == key else full_gradient(measure)).abs().max()
            errors[key] = float(error.max() / scale) if error.numel() else 0.0
    return errors

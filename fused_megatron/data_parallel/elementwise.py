"""Check that a torch optimizer is elementwise: the update of an element does not depend on other elements."""

from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError, first_line

_KNOWN = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.ASGD,
    torch.optim.Rprop,
)
_REFUSED = (torch.optim.Muon, torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.SparseAdam)
_STEPS = 3  # the first step of some optimizers differs from the later ones


def check_elementwise(optimizer: Any, options: dict[str, Any]) -> None:
    """Raise unless the optimizer updates some rows of a parameter in the same way as the whole parameter.

    A class that is not torch's own is tried: two optimizers of two halves of a tensor must compute the same as one
    optimizer of the whole tensor.

    Args:
        optimizer: subclass of torch.optim.Optimizer.
        options: options of its constructor.

    Raises:
        InputError: the argument is no optimizer class; the class is not elementwise or fails in the trial.
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        found = getattr(optimizer, "__name__", type(optimizer).__name__)
        raise InputError(f"optimizer={found} must be a class of optimizers, for example torch.optim.AdamW")
    name = optimizer.__name__
    if optimizer in _KNOWN:
        return
    problem = "needs whole parameters" if optimizer in _REFUSED else _problem_in_trial(optimizer, options)
    if problem:
        raise InputError(
            f"optimizer={name} {problem}, and a rank has only its rows (wanted: an elementwise optimizer, for example "
            "AdamW or SGD)"
        )


def _problem_in_trial(optimizer: type[torch.optim.Optimizer], options: dict[str, Any]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 6, generator=generator)
    gradients = [torch.randn(4, 6, generator=generator) * (1 + step) for step in range(_STEPS)]
    # The gradients of the halves differ in magnitude, so that their norms differ.
    gradients = [gradient * torch.tensor([1.0, 1.0, 9.0, 9.0]).unsqueeze(1) for gradient in gradients]
    results = []
    for parts in ([slice(None)], [slice(2), slice(2, None)]):
        try:
            trained = [_trained(optimizer, options, start[rows], [g[rows] for g in gradients]) for rows in parts]
        except Exception as error:  # any class of error: the trial calls the user's code
            return f"failed in a trial ({first_line(error)})"
        results.append(torch.cat(trained))
    if torch.allclose(results[0], results[1], rtol=1e-5, atol=1e-7):
        return None
    return "makes other updates of two halves of a tensor than of the whole"


def _trained(
    optimizer: Any, options: dict[str, Any], start: torch.Tensor, gradients: list[torch.Tensor]
) -> torch.Tensor:
    parameter = nn.Parameter(start.clone())
    made = optimizer([parameter], **options)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        made.step()
    return parameter.detach()

"""Auxiliary losses that a layer or a pipeline stage returns with its output, such as a router's balancing loss."""

from typing import Any, NamedTuple

import torch


class WithAuxiliaryLoss(NamedTuple):
    """Result, in training, of a layer, a block or a pipeline stage that has an auxiliary loss.

    Attributes:
        output: the usual result.
        auxiliary_loss: 0-dim float; a sum over the tokens of the microbatch, like the main loss: the step adds both and
            divides the sum once. Under tensor parallelism every rank has the same value. None: there is no loss.
        report: numbers about the microbatch, without gradient, that the layer sums over the microbatches of a step:
            the loads of experts. It returns them so that a recomputed block counts once. None: no numbers.
    """

    output: Any
    auxiliary_loss: torch.Tensor | None
    report: torch.Tensor | None = None


def split_auxiliary_loss(returned: Any) -> tuple[Any, torch.Tensor | None]:
    """Return the output and the auxiliary loss; None if there is no auxiliary loss."""
    return returned[:2] if isinstance(returned, WithAuxiliaryLoss) else (returned, None)

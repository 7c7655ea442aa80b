"""Auxiliary losses that a layer or a pipeline stage returns with its output, such as a router's balancing loss."""

from typing import Any, NamedTuple

import torch


class WithAuxiliaryLoss(NamedTuple):
    """Result, in training, of a layer, a block or a pipeline stage that has an auxiliary loss.

    Attributes:
        output: the usual result.
        auxiliary_loss: 0-dim float; a sum over the tokens of the microbatch, like the main loss: the step adds both and
            divides the sum once. Under tensor parallelism every rank has the same value.
    """

    output: Any
    auxiliary_loss: torch.Tensor


def split_auxiliary_loss(returned: Any) -> tuple[Any, torch.Tensor | None]:
    """Return the output and the auxiliary loss; None if there is no auxiliary loss."""
    return tuple(returned) if isinstance(returned, WithAuxiliaryLoss) else (returned, None)

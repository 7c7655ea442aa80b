"""A loss beside the output of a layer or of a pipeline stage, such as that of a router that is to balance experts."""

from typing import Any, NamedTuple

import torch


class WithAuxiliaryLoss(NamedTuple):
    """What a layer, a block or a pipeline stage returns in training, where a loss of its own is to be learned from.

    Attributes:
        output: what it would return otherwise.
        auxiliary_loss: 0-dim float, a sum over the tokens of the microbatch, as the loss is: the step adds both and
            divides them once. Under tensor parallelism the same on every rank.
    """

    output: Any
    auxiliary_loss: torch.Tensor


def split_auxiliary_loss(returned: Any) -> tuple[Any, torch.Tensor | None]:
    """The output, and the auxiliary loss where there is one."""
    return tuple(returned) if isinstance(returned, WithAuxiliaryLoss) else (returned, None)

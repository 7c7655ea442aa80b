"""Residual stream between the norms of transformer blocks, whose last addition may be left to the next norm."""

from typing import NamedTuple

import torch
from torch import nn

from fused_megatron import ops


class OpenSum(NamedTuple):
    """Residual stream whose last addition is left to the norm that follows, which adds in the same kernel.

    Attributes:
        stream: [S, B, H] or [S / R, B, H], the stream before the addition.
        output: what is added; shape and dtype of stream.
    """

    stream: torch.Tensor
    output: torch.Tensor


def closed(x: torch.Tensor | OpenSum) -> torch.Tensor:
    """Return the residual stream as one tensor, the same bits that a norm would add up."""
    return ops.bias_dropout_add(x.output, None, x.stream, 0.0) if isinstance(x, OpenSum) else x


def norm_and_stream(norm: nn.Module, x: torch.Tensor | OpenSum) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of a residual stream, and the stream: backward adds the gradients of both in one kernel."""
    normed, stream = norm(x.output, residual=x.stream) if isinstance(x, OpenSum) else norm(x, return_total=True)
    return normed, stream
